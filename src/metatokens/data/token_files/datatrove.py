"""datatrove's token files (huggingface/datatrove@main:src/datatrove/pipeline/tokens/tokenizer.py).

NAME.ds            raw little-endian uint16 or uint32
NAME.ds.index      little-endian uint64, the end of each document in tokens
NAME.ds.metadata   text, maybe absent: the tokenizer and the bytes of an id, as in `gpt2|2`, then the number of tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.token_files.base import TokenFile, damaged, read_small

if TYPE_CHECKING:
    from pathlib import Path

    from metatokens.data.shards import TokenDtype

_MAX_INDEX_BYTES = 8 << 30
_MAX_METADATA_BYTES = 1 << 16
_DTYPES: dict[int, TokenDtype] = {2: "uint16", 4: "uint32"}


def read_datatrove(path: Path) -> TokenFile | None:
    """Read `NAME.ds` with its index.

    Raises:
        DataError: There is no index, or it does not fit the length of the tokens.
    """
    if path.suffix != ".ds":
        return None
    index = path.with_name(path.name + ".index")
    content = read_small(index, _MAX_INDEX_BYTES)
    if not content or len(content) % 8:
        raise damaged(index, "ends of documents of 8 bytes each", f"{len(content)} bytes")
    ends = np.frombuffer(content, "<u8")
    size, num_tokens = path.stat().st_size, int(ends[-1])
    if (ends[1:] < ends[:-1]).any():
        raise damaged(index, "ends of documents in their order", "one before the end of the document before it")
    dtype = next((dtype for item, dtype in _DTYPES.items() if size == item * num_tokens), None)
    if dtype is None:
        raise damaged(path, f"{2 * num_tokens} or {4 * num_tokens} bytes for {num_tokens} tokens", f"{size} bytes")
    return TokenFile(path, dtype=dtype, ends=np.unique(ends[ends > 0]), tokenizer=_tokenizer_name(path))


def _tokenizer_name(path: Path) -> str | None:
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.exists():
        return None
    first = read_small(metadata, _MAX_METADATA_BYTES).decode(errors="replace").partition("\n")[0]
    name = first.split("|")[0]
    return None if name in {"", "Unknown Tokenizer"} else name
