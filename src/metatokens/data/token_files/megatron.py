"""Megatron's token files (NVIDIA/Megatron-LM@main:megatron/core/datasets/indexed_dataset.py).

NAME.bin   the ids of all sequences
NAME.idx   little-endian: 9 bytes "MMIDIDX", uint64 version 1, uint8 code of the type, uint64 S sequences, uint64 D,
           S int32 lengths, S int64 places in bytes, D int64: 0, then how many sequences end with each document
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.token_files.base import TokenFile, damaged, read_small

if TYPE_CHECKING:
    from pathlib import Path

    from metatokens.data.shards import TokenDtype

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_MAX_INDEX_BYTES = 8 << 30
# int16, int32, uint16; an id of a vocabulary is not negative, and has the same bits in the unsigned type
_DTYPES: dict[int, TokenDtype] = {3: "uint16", 4: "uint32", 8: "uint16"}


def read_megatron(path: Path) -> TokenFile | None:
    """Read `NAME.bin` that has a `NAME.idx` beside it.

    Raises:
        DataError: The index is damaged, its type is not one of token ids, or it does not fit the length of the tokens.
    """
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.exists():
        return None
    content = read_small(index, _MAX_INDEX_BYTES)
    if len(content) < _HEAD.size:
        raise damaged(index, f"at least {_HEAD.size} bytes", f"{len(content)} bytes")
    magic, version, code, num_sequences, num_ends = _HEAD.unpack_from(content)
    if (magic, version) != (_MAGIC, 1):
        raise damaged(index, "version 1 of Megatron's index", f"{magic!r}, version {version}")
    if code not in _DTYPES:
        raise damaged(index, "ids of type int16 (3), int32 (4) or uint16 (8)", f"type {code}")
    needed = _HEAD.size + 12 * num_sequences + 8 * num_ends  # behind it may follow the modes of multimodal sequences
    if len(content) < needed or not num_sequences or not num_ends:
        raise damaged(index, f"{needed} bytes for {num_sequences} sequences", f"{len(content)} bytes")
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEAD.size).astype(np.int64)
    places = np.frombuffer(content, "<i8", num_sequences, _HEAD.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_ends, _HEAD.size + 12 * num_sequences)
    item, size = np.dtype(_DTYPES[code]).itemsize, path.stat().st_size
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or ends[-1] * item != size or (places != (ends - lengths) * item).any():
        raise damaged(path, f"{ends[-1] * item} bytes, one sequence behind the other", f"{size} bytes, or gaps")
    if documents[-1] != num_sequences or (np.diff(documents) < 0).any() or documents[0] < 0:
        raise damaged(index, f"documents that end with sequence {num_sequences}", f"sequence {documents[-1]}")
    of_documents = np.concatenate([[0], ends])[documents]
    return TokenFile(path, dtype=_DTYPES[code], ends=np.unique(of_documents[of_documents > 0]).astype(np.uint64))
