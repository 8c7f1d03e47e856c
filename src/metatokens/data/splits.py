"""Splits: which documents of a corpus are for training, and which for validation.

A document's text alone decides its split, so a text and its copies are never in both. A corpus that is one text file
is cut in two at a line end instead, and the second part is the validation split.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, TypeAlias

from metatokens.data.source_files import file_kind, survey_source
from metatokens.data.sources import Document, SourceCounts, SourceOptions, iterate_documents
from metatokens.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from metatokens.data.shards import Split

    SplitDocument: TypeAlias = tuple[Split, Document]

_BY_HASH: Final = "validation where the first 8 bytes of SHA-256(UTF-8 text), big-endian, < validation_fraction * 2^64"
_AT_A_LINE_END: Final = (
    "one text file, validation from the line end nearest to 1 - validation_fraction of its characters"
)


def split_rule(source: str, validation_fraction: float) -> str:
    """Describe in words how `split_documents` splits a source."""
    return _AT_A_LINE_END if is_cut(source, validation_fraction) else _BY_HASH


def split_documents(source: str, documents: Iterable[Document], validation_fraction: float) -> Iterator[SplitDocument]:
    """Yield each document with its split; a document that straddles the cut of a text file becomes two."""
    if is_cut(source, validation_fraction):
        yield from _cut(list(documents), validation_fraction)
        return
    for document in documents:
        yield split_of(document.text, validation_fraction), document


def split_of(text: str, validation_fraction: float) -> Split:
    """Return a document's split, a function of its text alone; not for a corpus that is cut (`is_cut`)."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "validation" if draw < int(validation_fraction * 2**64) else "train"


def require_splits(source: str, options: SourceOptions, validation_fraction: float) -> None:
    """Read documents until each wanted split has one; in a large corpus the first few suffice.

    Raises:
        DataError: A split gets no document, or the input read so far is bad.
    """
    wanted: set[Split] = {"train", "validation"} if validation_fraction else {"train"}
    counts = SourceCounts()
    for split, _ in split_documents(source, iterate_documents(source, options, counts), validation_fraction):
        wanted.discard(split)
        if not wanted:
            return
    raise DataError(
        source,
        expected=f"at least one document in the {min(wanted)} split",
        found=f"none of {counts.documents} documents ({counts.empty} empty, {counts.skipped} skipped)",
        remedy="use more documents, or another validation_fraction (0 for no validation split)",
    )


def is_cut(source: str, validation_fraction: float) -> bool:
    """Tell whether a source is one text file and a part of it is wanted for validation."""
    files = survey_source(source).files
    kind = file_kind(files[0]) if len(files) == 1 else None
    return validation_fraction > 0 and kind is not None and kind.suffix == ".txt"


def _cut(documents: list[Document], validation_fraction: float) -> Iterator[SplitDocument]:
    place = int((1 - validation_fraction) * sum(len(document.text) for document in documents))
    for text, source in documents:
        end = _nearest_line_end(text, place) if 0 < place < len(text) else max(0, min(place, len(text)))
        if end:
            yield "train", Document(text[:end], source)
        if end < len(text):
            yield "validation", Document(text[end:], source)
        place -= len(text)


def _nearest_line_end(text: str, place: int) -> int:
    """Return the start of a line that is nearest to `place`, or `place` itself if there is no line end to cut at."""
    ends = (text.rfind("\n", 0, place) + 1, text.find("\n", place) + 1)
    return min((end for end in ends if 0 < end < len(text)), key=lambda end: abs(end - place), default=place)
