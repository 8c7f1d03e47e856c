"""What a format says about a token file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from metatokens.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from metatokens.data.shards import TokenDtype


class TokenFile(NamedTuple):
    """Tokens in a file, little-endian, one after the other."""

    path: Path
    dtype: TokenDtype | None
    """None if the format does not say."""
    ends: npt.NDArray[np.uint64] | None
    """(documents,) the end of each document in tokens, none empty; None if a document ends after each end of text."""
    offset: int = 0
    """Bytes before the first token."""
    tokenizer: str | None = None
    """Name of the tokenizer, if the format has it."""


def read_small(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file that lies beside the tokens.

    Raises:
        DataError: It cannot be read, or is longer than `max_bytes`.
    """
    try:
        size = path.stat().st_size
        if size <= max_bytes:
            return path.read_bytes()
    except OSError as error:
        raise damaged(path, "a readable file", error.strerror or str(error)) from error
    raise damaged(path, f"at most {max_bytes} bytes", f"{size} bytes")


def damaged(path: Path, expected: str, found: str) -> DataError:
    """Return the error for a file that does not fit its format."""
    return DataError(str(path), expected=expected, found=found, remedy="write it again, or name other files")
