"""Byte-level vocabularies: the check that none loses text, and tiktoken's faster encoder for those like GPT-2's.

UTF-8 uses 243 of the 256 byte values. If a vocabulary lacks one of them, every encoder drops that byte silently, and
the ids decode to another text. The other 13 values never occur in text, so a vocabulary may lack them.

tiktoken encodes a byte-level BPE like GPT-2's several times faster than `tokenizers`. It ranks tokens by id, so a
vocabulary whose ids do not follow the order of its merges stays with `tokenizers`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from metatokens.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TokenIds: TypeAlias = npt.NDArray[np.uint32]
Specification: TypeAlias = dict[str, Any]
"""The parsed `tokenizer.json`."""

# all bytes of UTF-8: ASCII, continuations, and the leads of two, three and four bytes (RFC 3629, section 4)
_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
_MOST_LOST = 16  # a vocabulary that lacks more is refused before any text is read

# GPT-2's split pattern as tiktoken states it (openai/tiktoken@main:tiktoken_ext/openai_public.py, MIT)
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# options of a BPE model that tiktoken does not support
_BEYOND_TIKTOKEN = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"),
)


def lost_bytes(specification: Specification) -> frozenset[int]:
    """Return the bytes of UTF-8 that a vocabulary would silently drop from a text, a few at most.

    A byte-level vocabulary, or one that falls back to bytes, needs a token for every byte of UTF-8 that occurs. That of
    SmolLM2 lacks 8: control characters, and leads of scripts that hardly occur. Any other vocabulary needs an unknown
    token, which marks the text that it cannot express.

    Raises:
        UsageError: The vocabulary lacks these tokens; the message counts the missing bytes and names the first.
    """
    model = specification["model"]
    vocabulary = _words(model)
    if _is_byte_level(specification):
        names = {byte: char for char, byte in byte_alphabet().items()}
    elif model.get("byte_fallback"):
        names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    elif model.get("unk_token") is not None or model.get("unk_id") is not None:
        return frozenset()
    else:
        raise UsageError(
            "tokenizer",
            expected="a token for every byte, or an unknown token",
            found=f"neither in its {model['type']} vocabulary, so text would be lost",
            remedy="use a byte-level tokenizer",
        )
    missing = [byte for byte in _UTF8_BYTES if names[byte] not in vocabulary]
    if len(missing) > _MOST_LOST:
        raise UsageError(
            "tokenizer",
            expected=f"a vocabulary with all {len(_UTF8_BYTES)} bytes of UTF-8",
            found=f"{len(missing)} missing, the first {missing[0]:#04x}, so text would be lost",
            remedy="train it with the full byte alphabet",
        )
    return frozenset(missing)


def tiktoken_encode(specification: Specification) -> Callable[[str], TokenIds] | None:
    """Return tiktoken's encoder for this vocabulary, or None if it is not a byte-level BPE like GPT-2's.

    The encoder returns (length,) uint32. It raises ValueError for a text that overflows its pattern matcher, such as a
    million spaces.
    """
    import tiktoken

    model, split = specification["model"], specification["pre_tokenizer"] or {}
    is_gpt2_like = (
        model["type"] == "BPE"
        and not any(model.get(key) for key in _BEYOND_TIKTOKEN)
        and all(token["special"] for token in specification["added_tokens"])
        and specification["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and not split["add_prefix_space"]
        and split.get("use_regex", True)
    )
    if not is_gpt2_like:
        return None
    vocabulary, byte_of = model["vocab"], byte_alphabet()
    latin = str.maketrans({char: chr(byte) for char, byte in byte_of.items()})
    merged = [left + right for left, right in model["merges"]]
    if any(a >= b for a, b in pairwise(vocabulary[token] for token in merged)):
        return None
    alphabet = [char for char in byte_of if char in vocabulary]
    ranks = {token.translate(latin).encode("latin-1"): vocabulary[token] for token in [*alphabet, *merged]}
    encoding = tiktoken.Encoding("text", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> TokenIds:
        return encoding.encode_to_numpy(text, disallowed_special=())

    return encode


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of GPT-2's byte-level alphabet stands for.

    Each printable Latin-1 character stands for its own byte. The characters from U+0100 on stand for the other bytes,
    in order (openai/gpt-2@master:src/encoder.py, bytes_to_unicode, MIT).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _words(model: dict[str, Any]) -> set[str]:
    vocabulary = model["vocab"]
    return {word for word, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)


def _is_byte_level(specification: Specification) -> bool:
    steps = (*_steps(specification["pre_tokenizer"]), *_steps(specification["normalizer"]))
    return any(step["type"] == "ByteLevel" for step in steps)


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a pre-tokenizer or normalizer; if it is a sequence, yield its parts instead."""
    if step is not None and step["type"] == "Sequence":
        for part in step.get("pretokenizers") or step.get("normalizers") or ():
            yield from _steps(part)
    elif step is not None:
        yield step
