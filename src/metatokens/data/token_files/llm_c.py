"""llm.c's token files: a header of 256 int32, then the ids (karpathy/llm.c@master:dev/data/data_common.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.token_files.base import TokenFile, damaged

if TYPE_CHECKING:
    from pathlib import Path

    from metatokens.data.shards import TokenDtype

_HEADER_BYTES = 256 * 4
# the first number of the header, with the version that belongs to it
_DTYPES: dict[tuple[int, int], TokenDtype] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}


def read_llm_c(path: Path) -> TokenFile | None:
    """Read `NAME.bin` with llm.c's header; a document ends after each end of text.

    Raises:
        DataError: The number of tokens is not that of the header.
    """
    if path.suffix != ".bin":
        return None
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES:
        return None
    magic, version, num_tokens, *_ = np.frombuffer(header, "<i4").tolist()
    dtype = _DTYPES.get((magic, version))
    if dtype is None:
        return None
    expected = _HEADER_BYTES + num_tokens * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise damaged(path, f"{expected} bytes for {num_tokens} tokens", f"{path.stat().st_size} bytes")
    return TokenFile(path, dtype=dtype, ends=None, offset=_HEADER_BYTES)
