"""Sources: they read documents from files, folders, Hugging Face datasets and the text that comes with Python.

A `.txt` file is one document, or several if it exceeds the size limit of a document. Each `.jsonl` line, `.parquet` row
and element of a `.json` array is one document. `source_files` decides which files are read. Files are read in chunks
and every document has a size limit, so neither a decompression bomb nor a truncated archive gets through. Text is
*bad* if it is not UTF-8, has a lone surrogate or a NUL, or starts with a byte order mark; `SourceOptions.on_bad_text`
says what happens to it. Every error names the file and the row or byte; its remedy names only options that the caller
can set.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from metatokens.data.python_docs import python_docs
from metatokens.data.source_files import (
    PYTHON_DOCS,
    check_digest,
    file_kind,
    malformed,
    optional_package,
    source_files,
    survey_source,
    unpacked_chunks,
)
from metatokens.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["PYTHON_DOCS", "Document", "SourceCounts", "SourceOptions", "iterate_documents", "source_files"]

_PARQUET_ROWS = 256  # rows decoded at a time
_MAX_SKIPPED_SHARE = 0.01  # a corpus with more bad documents than this is broken, not noisy
_BYTE_ORDER_MARK = "\ufeff"
_BAD_CHARACTERS = re.compile(f"\\A{_BYTE_ORDER_MARK}|\0|[\ud800-\udfff]")


class Document(NamedTuple):
    """One document of a corpus."""

    text: str
    source: str
    """File name relative to the folder, or dataset id, with `, row N` (from 1) where a file holds several."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How documents are read."""

    text_field: str = "text"
    """The column or JSON key that holds the text."""
    config_name: str | None = None
    """Configuration of a Hugging Face dataset, such as "en"."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    on_bad_text: Literal["error", "replace", "skip"] = "error"
    """Bad text: stop, put U+FFFD in its place (a byte order mark is just dropped), or leave the document out.
    "skip" also leaves out malformed rows."""
    max_document_bytes: int = 64 << 20
    """Longest document, in bytes of its file or row after decompression. A `.txt` that is not compressed may be longer:
    it is cut at line ends into documents of at most this size."""
    max_documents: int | None = None
    """Documents to read, at least 1; off means all."""

    def __post_init__(self) -> None:
        """Refuse a `max_documents` below 1."""
        if self.max_documents is not None and self.max_documents < 1:
            raise UsageError(
                "max_documents", expected="at least 1", found=str(self.max_documents), remedy="leave it out for all"
            )


@dataclass
class SourceCounts:
    """What happened to documents while they were read."""

    documents: int = 0
    """Documents yielded."""
    empty: int = 0
    """Empty documents, left out."""
    skipped: int = 0
    """Bad documents and malformed rows, left out."""
    replaced: int = 0
    """Bad documents yielded with U+FFFD in the bad places."""


def iterate_documents(
    source: str, options: SourceOptions | None = None, counts: SourceCounts | None = None
) -> Iterator[Document]:
    """Read the documents of a source in an order that depends only on its content.

    Args:
        source: A file, a folder (read recursively, in the order of its relative paths, hidden files left out),
            `python-docs`, or `owner/name` of a Hugging Face dataset, which is streamed.
        options: How to read; None means the defaults, and that errors do not suggest setting one.
        counts: Updated in place while documents are drawn.

    Raises:
        DataError: The input is missing, unreadable or malformed, a document exceeds the size limit, text is bad under
            `on_bad_text="error"`, or more than 1% of the documents were skipped (raised at the end of the source).
        UsageError: The source needs a package of the extra `data` that is not installed.
    """
    counts = counts if counts is not None else SourceCounts()
    reader = _Reader(options, counts)
    options = options or SourceOptions()
    for document in reader.read(source):
        if not document.text:
            counts.empty += 1
            continue
        counts.documents += 1
        yield document
        if counts.documents == options.max_documents:
            break
    if counts.skipped > _MAX_SKIPPED_SHARE * (counts.documents + counts.skipped):
        raise DataError(
            source,
            expected=f"at most {_MAX_SKIPPED_SHARE:.0%} of the documents skipped",
            found=f"{counts.skipped} of {counts.documents + counts.skipped}",
            remedy="repair the corpus",
        )


class _Reader:
    """Reads one source under given options; it does not yield the bad documents that it skips."""

    def __init__(self, options: SourceOptions | None, counts: SourceCounts) -> None:
        self._can_set_options = options is not None
        self._options = options or SourceOptions()
        self._counts = counts

    def read(self, source: str) -> Iterator[Document]:
        found = survey_source(source)
        for path in found.files:
            check_digest(path, found.root)
            yield from self._read_file(path, path.relative_to(found.root).as_posix())
        if not found.files:
            yield from map(Document._make, python_docs()) if source == PYTHON_DOCS else self._read_dataset(source)

    def _read_file(self, path: Path, name: str) -> Iterator[Document]:
        kind = file_kind(path)
        if kind is None:
            raise AssertionError(f"{path} is not among the files of a source")
        if kind.suffix == ".parquet":
            yield from self._read_parquet(path, name)
        elif kind.suffix == ".jsonl" or (kind.suffix == ".json" and self._holds_json_lines(path, kind.packed)):
            yield from self._read_json_lines(path, name, kind.packed)
        elif kind.suffix == ".json":
            yield from self._read_json(path, name, kind.packed)
        elif not kind.packed and path.stat().st_size > self._options.max_document_bytes:
            for number, part in enumerate(self._parts(path), start=1):
                yield from self._document(part, f"{path}, part {number}", f"{name}, part {number}")
        else:
            yield from self._document(self._whole(path, kind.packed), str(path), name)

    def _document(self, content: bytes, where: str, name: str) -> Iterator[Document]:
        text = self._clean(content, where)
        if text is not None:
            yield Document(text, name)

    def _read_json_lines(self, path: Path, name: str, packed: str) -> Iterator[Document]:
        for row, line in enumerate(self._lines(path, packed), start=1):
            where = f"{path}, row {row}"
            text = self._clean(line, where)
            if text is not None and text.strip():  # a blank line is not a row
                text = self._text_of_row(text, where)
                if text is not None:
                    yield Document(text, f"{name}, row {row}")

    def _holds_json_lines(self, path: Path, packed: str) -> bool:
        """Tell whether the first line that is not blank is a complete JSON object."""
        try:
            return isinstance(json.loads(next(line for line in self._lines(path, packed) if line.strip())), dict)
        except (StopIteration, ValueError, RecursionError):
            return False

    def _read_json(self, path: Path, name: str, packed: str) -> Iterator[Document]:
        """Read a file that is one JSON value: an array of rows, or one row."""
        content = self._clean(self._whole(path, packed), str(path))
        if content is None:
            return
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            self._reject(malformed(str(path), "JSON", str(error)))
            return
        for row, record in enumerate(value if isinstance(value, list) else [value], start=1):
            text = self._text_of_record(record, f"{path}, row {row}")
            if text is not None:
                yield Document(text, f"{name}, row {row}")

    def _whole(self, path: Path, packed: str) -> bytes:
        content = bytearray()
        for chunk in unpacked_chunks(path, packed):
            content += chunk
            self._limit(len(content), str(path))
        return bytes(content)

    def _parts(self, path: Path) -> Iterator[bytes]:
        """Yield a file in parts, each cut at the last line end within the size limit."""
        rest = bytearray()
        for chunk in unpacked_chunks(path, ""):
            rest += chunk
            while len(rest) > self._options.max_document_bytes:
                end = rest.rfind(b"\n", 0, self._options.max_document_bytes) + 1
                if not end:
                    self._limit(len(rest), f"{path}, a line")
                yield bytes(rest[:end])
                del rest[:end]
        if rest:
            yield bytes(rest)

    def _lines(self, path: Path, packed: str) -> Iterator[bytes]:
        rest, row, blank = b"", 1, 0
        for chunk in unpacked_chunks(path, packed):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                # a small archive may hold blank lines for hours, so they count as one document
                blank = 0 if line.strip() else blank + len(line) + 1
                self._limit(max(len(line), blank), f"{path}, row {row}")
                yield line
                row += 1
            self._limit(len(rest), f"{path}, row {row}")
        if rest:
            yield rest

    def _read_parquet(self, path: Path, name: str) -> Iterator[Document]:
        parquet, arrow = optional_package("pyarrow.parquet"), optional_package("pyarrow")
        field = self._options.text_field
        row = 0
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                columns = file.schema_arrow.names
                if field not in columns:
                    raise self._missing_field(str(path), columns)
                kind = file.schema_arrow.field(field).type
                if not _holds_text(arrow.types, kind):
                    raise self._no_text(str(path), str(kind))
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                    # as bytes, because a string column may hold bytes that are not UTF-8
                    column = batch.column(0)
                    column = column.dictionary_decode() if arrow.types.is_dictionary(kind) else column
                    for value in column.cast(arrow.large_binary()).to_pylist():
                        row += 1
                        text = self._clean_value(value, f"{path}, row {row}")
                        if text is not None:
                            yield Document(text, f"{name}, row {row}")
        except (arrow.ArrowException, OSError) as error:
            raise malformed(f"{path}, after row {row}", "a readable parquet file", str(error)) from error

    def _read_dataset(self, source: str) -> Iterator[Document]:
        datasets = optional_package("datasets")
        options = self._options
        try:
            rows = datasets.load_dataset(source, options.config_name, split=options.split, streaming=True)
            for row, record in enumerate(rows, start=1):
                where = f"{source}, row {row}"
                if options.text_field not in record:
                    raise self._missing_field(where, list(record))
                text = self._clean_value(record[options.text_field], where)
                if text is not None:
                    yield Document(text, where)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                source,
                expected=f"a file, a folder, {PYTHON_DOCS}, or a Hugging Face dataset that can be reached",
                found=f"no such path, and {type(error).__name__}: {error}",
                remedy=self._remedy("check the spelling and the connection", "set config_name or split"),
            ) from error

    def _text_of_row(self, line: str, where: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._reject(malformed(where, "one JSON object a line", str(error)))
            return None
        return self._text_of_record(record, where)

    def _text_of_record(self, record: object, where: str) -> str | None:
        field = self._options.text_field
        if not isinstance(record, dict):
            self._reject(malformed(where, "a JSON object", type(record).__name__))
        elif field not in record:
            self._reject(self._missing_field(where, list(record)))
        else:
            return self._clean_value(record[field], where)
        return None

    def _clean_value(self, value: object, where: str) -> str | None:
        if isinstance(value, str | bytes):
            self._limit(len(value), where)
            return self._clean(value, where)
        self._reject(self._no_text(where, type(value).__name__))
        return None

    def _clean(self, content: bytes | str, where: str) -> str | None:
        """Return the text, with bad places replaced if the options say so, or None if it is skipped."""
        found = None
        if isinstance(content, bytes):
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                found = f"byte {content[error.start]:#04x} at byte offset {error.start}"
                text = content.decode(errors="replace")
        else:
            text = content
        if found is None and _may_be_bad(text) and (bad := _BAD_CHARACTERS.search(text)):
            offset = len(text[: bad.start()].encode(errors="surrogatepass"))
            found = f"U+{ord(bad[0]):04X} at byte offset {offset}"
        if found is None:
            return text
        if self._options.on_bad_text == "replace":
            self._counts.replaced += 1
            return _BAD_CHARACTERS.sub("\ufffd", text.removeprefix(_BYTE_ORDER_MARK))
        self._reject(
            DataError(
                where,
                expected="UTF-8 text without NUL, lone surrogate or byte order mark",
                found=found,
                remedy=self._remedy("repair the file", "set on_bad_text to replace or skip"),
            )
        )
        return None

    def _reject(self, error: DataError) -> None:
        """Raise the error, or count the document as skipped if the options say so."""
        if self._options.on_bad_text != "skip":
            raise error
        self._counts.skipped += 1

    def _limit(self, num_bytes: int, where: str) -> None:
        if num_bytes > self._options.max_document_bytes:
            raise DataError(
                where,
                expected=f"a document of at most {self._options.max_document_bytes} bytes",
                found=f"{num_bytes} bytes or more",
                remedy=self._remedy("cut it into documents", "raise max_document_bytes"),
            )

    def _missing_field(self, where: str, fields: list[str]) -> DataError:
        return DataError(
            where,
            expected=f"the text in {self._options.text_field!r}",
            found=f"only {', '.join(map(str, fields)) or 'no field'}",
            remedy=self._remedy("put it there", "set text_field to one of them"),
        )

    def _no_text(self, where: str, found: str) -> DataError:
        return DataError(
            where,
            expected=f"text in {self._options.text_field!r}",
            found=found,
            remedy=self._remedy("put text there", "set text_field, or on_bad_text to skip such a row"),
        )

    def _remedy(self, remedy: str, options: str) -> str:
        """Return the remedy, followed by that with options if the caller can set them."""
        return f"{remedy}, or {options}" if self._can_set_options else remedy


def _holds_text(types: Any, kind: Any) -> bool:
    """Tell whether the values of an Arrow type are text, or bytes that may hold text."""
    if types.is_dictionary(kind):
        return _holds_text(types, kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in (*tests, types.is_binary, types.is_large_binary, types.is_binary_view))


def _may_be_bad(text: str) -> bool:
    """Tell quickly whether a text may hold a bad character; the pattern that finds it is much slower."""
    if "\0" in text or text.startswith(_BYTE_ORDER_MARK):
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
