"""Documents out of files, folders, Hugging Face datasets and the text that comes with Python.

A `.txt` file is one document; a `.jsonl` line and a `.parquet` row are one each. `.txt` and `.jsonl` may be
compressed (`.gz`, `.zst`). Files are read in chunks and every document has a size limit, so that neither a
decompression bomb nor a truncated archive gets through. Text is *bad* if it is not UTF-8, has a lone surrogate or
a NUL, or starts with a byte order mark; `SourceOptions.on_bad_text` says what then happens. Every fault names the
file and the row or byte.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib
import json
import os
import re
import sysconfig
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from metatokens.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import ModuleType

PYTHON_DOCS = "python-docs"

_TEXT_SUFFIXES = (".txt", ".jsonl")
_SUFFIXES = (*(text + packed for text in _TEXT_SUFFIXES for packed in ("", ".gz", ".zst")), ".parquet")
_CHUNK_BYTES = 1 << 20
_ZSTD_CHUNK_BYTES = 1 << 10  # a zstd block may hold 128 KiB in 4 bytes; this bounds one step to 32 MiB
_PARQUET_ROWS = 256  # rows decoded at a time
_MAX_SKIPPED_SHARE = 0.01  # more bad documents than this are a broken corpus, not noise
_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_BYTE_ORDER_MARK = "\ufeff"
_BAD_CHARACTERS = re.compile(f"\\A{_BYTE_ORDER_MARK}|\0|[\ud800-\udfff]")
# packages of the standard library that hold tests, vendored code or applications
_SKIPPED_PACKAGES = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"}
    | {"site-packages", "dist-packages"}
)


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
    """Longest document, in bytes of its file or row after decompression."""
    max_documents: int | None = None
    """Documents to read, at least 1; off means all."""

    def __post_init__(self) -> None:
        """Refuse a number of documents that cannot be read."""
        if self.max_documents is not None and self.max_documents < 1:
            raise UsageError(
                "max_documents", expected="at least 1", found=str(self.max_documents), remedy="leave it out for all"
            )


@dataclass
class SourceCounts:
    """What happened to documents while they were read."""

    documents: int = 0
    """Documents handed out."""
    empty: int = 0
    """Documents without a character, left out."""
    skipped: int = 0
    """Bad documents and malformed rows, left out."""
    replaced: int = 0
    """Bad documents handed out with U+FFFD in the bad places."""


def iterate_documents(
    source: str, options: SourceOptions | None = None, counts: SourceCounts | None = None
) -> Iterator[Document]:
    """Read the documents of a source in an order that depends on its content only.

    Args:
        source: A file, a folder (read recursively, in the order of its relative paths, hidden files left out),
            `python-docs`, or `owner/name` of a Hugging Face dataset, which is streamed.
        options: How to read; None means the defaults.
        counts: Updated in place while documents are drawn.

    Raises:
        DataError: Missing, unreadable or malformed input, a document over the limit, bad text under
            `on_bad_text="error"`, or more than 1 % skipped (when the source is exhausted).
        UsageError: A package of the extra `data` is needed and not installed.
    """
    options = options or SourceOptions()
    counts = counts if counts is not None else SourceCounts()
    reader = _Reader(options, counts)
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


def source_files(source: str) -> list[Path]:
    """Return the files that a source consists of, in reading order; empty for what is not on the disk.

    Raises:
        DataError: A path that is missing, unsupported, or a folder without a supported file.
    """
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise _unsupported(source, "a folder without such a file")
        return sorted(files, key=lambda p: p.relative_to(path).as_posix())
    if path.exists():
        if not path.name.endswith(_SUFFIXES):
            raise _unsupported(source, f"suffix {path.suffix!r}")
        return [path]
    # a dataset id has the form of a path; what can only be meant as a path is not looked for on the network
    is_dataset = _DATASET_ID.fullmatch(source) and not source.endswith(_SUFFIXES) and not path.parent.is_dir()
    if source == PYTHON_DOCS or is_dataset:
        return []
    raise _unsupported(source, "no such file or folder")


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Reader:
    """Reads one source under given options; a document left out because it is bad is not yielded."""

    def __init__(self, options: SourceOptions, counts: SourceCounts) -> None:
        self._options = options
        self._counts = counts

    def read(self, source: str) -> Iterator[Document]:
        files = source_files(source)
        root = Path(source) if Path(source).is_dir() else Path(source).parent
        for path in files:
            yield from self._read_file(path, path.relative_to(root).as_posix())
        if not files:
            yield from _python_docs() if source == PYTHON_DOCS else self._read_dataset(source)

    def _read_file(self, path: Path, name: str) -> Iterator[Document]:
        if path.suffix == ".parquet":
            yield from self._read_parquet(path, name)
        elif ".jsonl" in path.suffixes[-2:]:
            for row, line in enumerate(self._lines(path), start=1):
                where = f"{path}, row {row}"
                text = self._clean(line, where)
                if text is not None and text.strip():
                    text = self._text_of_row(text, where)
                elif text is not None:
                    continue  # a blank line is no row
                if text is not None:
                    yield Document(text, f"{name}, row {row}")
        else:
            text = self._clean(self._whole(path), str(path))
            if text is not None:
                yield Document(text, name)

    def _whole(self, path: Path) -> bytes:
        content = bytearray()
        for chunk in _chunks(path):
            content += chunk
            self._limit(len(content), str(path))
        return bytes(content)

    def _lines(self, path: Path) -> Iterator[bytes]:
        rest, row = b"", 1
        for chunk in _chunks(path):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._limit(len(line), f"{path}, row {row}")
                yield line
                row += 1
            self._limit(len(rest), f"{path}, row {row}")
        if rest:
            yield rest

    def _read_parquet(self, path: Path, name: str) -> Iterator[Document]:
        parquet, arrow = _optional("pyarrow.parquet"), _optional("pyarrow")
        field = self._options.text_field
        row = 0
        try:
            with parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                if field not in columns:
                    raise self._missing_field(str(path), columns)
                kind = file.schema_arrow.field(field).type
                if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                    raise _malformed(str(path), f"a string column {field!r}", str(kind))
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                    # as bytes, because a string column may hold what is not UTF-8
                    for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                        row += 1
                        text = self._clean_value(value, f"{path}, row {row}")
                        if text is not None:
                            yield Document(text, f"{name}, row {row}")
        except (arrow.ArrowException, OSError) as error:
            raise _malformed(f"{path}, after row {row}", "a readable parquet file", str(error)) from error

    def _read_dataset(self, source: str) -> Iterator[Document]:
        datasets = _optional("datasets")
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
                remedy="check the spelling, the configuration, the split and the connection",
            ) from error

    def _text_of_row(self, line: str, where: str) -> str | None:
        field = self._options.text_field
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._reject(_malformed(where, "one JSON object a line", str(error)))
            return None
        if not isinstance(record, dict):
            self._reject(_malformed(where, "a JSON object", type(record).__name__))
        elif field not in record:
            self._reject(self._missing_field(where, list(record)))
        else:
            return self._clean_value(record[field], where)
        return None

    def _clean_value(self, value: object, where: str) -> str | None:
        if isinstance(value, str | bytes):
            self._limit(len(value), where)
            return self._clean(value, where)
        self._reject(_malformed(where, f"text in {self._options.text_field!r}", type(value).__name__))
        return None

    def _clean(self, content: bytes | str, where: str) -> str | None:
        """Return the text, with bad places replaced if that is the option, or None if it is left out."""
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
                remedy="repair the file, or set on_bad_text to replace or skip",
            )
        )
        return None

    def _reject(self, error: DataError) -> None:
        """Raise, or count a document that is left out."""
        if self._options.on_bad_text != "skip":
            raise error
        self._counts.skipped += 1

    def _limit(self, num_bytes: int, where: str) -> None:
        if num_bytes > self._options.max_document_bytes:
            raise DataError(
                where,
                expected=f"a document of at most {self._options.max_document_bytes} bytes",
                found=f"{num_bytes} bytes or more",
                remedy="cut it into documents, or raise max_document_bytes",
            )

    def _missing_field(self, where: str, fields: list[str]) -> DataError:
        return DataError(
            where,
            expected=f"the text in {self._options.text_field!r}",
            found=f"only {', '.join(map(str, fields)) or 'no field'}",
            remedy="set text_field",
        )


def _may_be_bad(text: str) -> bool:
    """Rule out bad characters at the speed of memory; the pattern, much slower, then finds them."""
    if "\0" in text or text.startswith(_BYTE_ORDER_MARK):
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in pieces of bounded size."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    unpack = _plain_chunks
    if path.suffix == ".gz":
        unpack = _gzip_chunks
    elif path.suffix == ".zst":
        errors += (_optional("zstandard").ZstdError,)
        unpack = _zstd_chunks
    num_bytes = 0
    try:
        for chunk in unpack(path):
            num_bytes += len(chunk)
            yield chunk
    except errors as error:
        raise _malformed(f"{path}, after {num_bytes} unpacked bytes", "a readable file", str(error)) from error


def _plain_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # a decompression object, because the library's stream reader takes a truncated frame for a complete one
    decompressor = _optional("zstandard").ZstdDecompressor()
    frame = decompressor.decompressobj()
    with path.open("rb") as file:
        while packed := file.read(_ZSTD_CHUNK_BYTES):
            while packed:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the last zstd frame is truncated")


def _python_docs() -> Iterator[Document]:
    """Yield the topics of `help()`, then the docstrings of each module of the standard library."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield Document(topics[topic], f"pydoc_data.topics, {topic}")
    root = Path(sysconfig.get_path("stdlib"))
    for folder, packages, names in os.walk(root):
        packages[:] = sorted(set(packages) - _SKIPPED_PACKAGES)  # what os.walk goes into, and in which order
        for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            relative = path.relative_to(root)
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = _documentation(path, module)
            if text:
                yield Document(text, f"python/{relative.as_posix()}")


@functools.cache  # two megabytes in all; parsing takes a second or two, and a demonstration reads all of it three times
def _documentation(path: Path, module: str) -> str:
    """Return the docstrings of a file of the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in string literals of the library
        tree = ast.parse(path.read_bytes())
    return "\n\n".join(_docstrings(tree, module))


def _docstrings(node: ast.AST, name: str) -> Iterable[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n{docstring}"
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")


def _optional(module: str) -> ModuleType | Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"package {module.partition('.')[0]}",
            expected="to be installed, because the source needs it",
            found=str(error),
            remedy="run `pip install 'metatokens[data]'`",
        ) from error


def _malformed(where: str, expected: str, found: str) -> DataError:
    return DataError(where, expected=expected, found=found, remedy="repair or replace the file")


def _unsupported(source: str, found: str) -> DataError:
    return DataError(
        source,
        expected=f"a file or folder of {', '.join(_SUFFIXES)}, {PYTHON_DOCS}, or the owner/name of a dataset",
        found=found,
        remedy="check the spelling",
    )
