"""The files of a source: which ones it consists of, which ones of a folder are left out, and their unpacked bytes.

A file's kind is known by its suffix, in any case: `.txt`, `.jsonl` and `.json`, each of which may be compressed (`.gz`,
`.zst`, `.bz2`, `.xz`), and `.parquet`. Hidden files are ignored. Everything else that is left out is counted and named:
files of other kinds, links to folders, unreadable files and folders, and `.json` files beside other text, because
these mostly hold metadata.

A file whose SHA-256 is written beside it, in NAME.sha256 or in SHA256SUMS as the command sha256sum writes them, or in
SHA256SUMS at the root of a source folder, is compared with that before it is read. Parquet has no other protection,
unless its writer put checksums into the pages.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import os
import re
import warnings
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metatokens.errors import DataError, UsageError
from metatokens.storage import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

PYTHON_DOCS = "python-docs"

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
_PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_PARQUET_SUFFIX = ".parquet"
_CHUNK_BYTES = 1 << 20
_ZSTD_CHUNK_BYTES = 1 << 10  # a zstd block may hold 128 KiB in 4 bytes; this bounds one step to 32 MiB
_ZSTD_LONGEST_WINDOW = 1 << 31  # of `zstd --ultra --long=31`; the library's own bound is 128 MiB
_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DIGEST_SUFFIX, _DIGESTS_NAME = ".sha256", "SHA256SUMS"
_DIGEST_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](.+))?")
_LARGEST_DIGESTS = 1 << 24
_NAMED = 3  # how many of the files left out for one reason are named


class FileKind(NamedTuple):
    """The kind of a file, by its name."""

    suffix: str
    """One of .txt, .jsonl, .json and .parquet."""
    packed: str
    """The suffix of the compression; empty if the file is not compressed."""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, and those that were left out."""

    root: Path
    """The folder that their names are relative to."""
    files: tuple[Path, ...] = ()
    """In reading order; empty for a source that is not on the disk."""
    left_out: tuple[str, ...] = ()
    """One text for each reason: how many were left out, and the first names."""


def file_kind(path: Path) -> FileKind | None:
    """Return the kind of a file by its name, or None if such files are not read."""
    name = path.name.lower()
    packed = next((suffix for suffix in _PACKED_SUFFIXES if name.endswith(suffix)), "")
    name = name.removesuffix(packed)
    suffixes = _TEXT_SUFFIXES if packed else (*_TEXT_SUFFIXES, _PARQUET_SUFFIX)
    suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
    return None if suffix is None else FileKind(suffix, packed)


def source_files(source: str) -> list[Path]:
    """Return the files of a source in reading order, and warn of those left out.

    Raises:
        DataError: See `survey_source`.
    """
    found = survey_source(source)
    if found.left_out:
        warnings.warn(f"left out of {source}: {', '.join(found.left_out)}", stacklevel=2)
    return list(found.files)


def survey_source(source: str) -> SourceFiles:
    """Find the files that a source consists of; a source that is not on the disk has none.

    Raises:
        DataError: The path is missing, is of an unsupported kind, or is a folder without a supported file.
    """
    path = Path(source)
    if path.is_dir():
        found = _survey_folder(path)
        if not found.files:
            raise _unsupported(source, ", ".join(["a folder without such a file", *found.left_out]))
        return found
    if path.exists():
        if file_kind(path) is None:
            raise _unsupported(source, f"suffix {path.suffix!r}")
        return SourceFiles(path.parent, (path,))
    # a dataset id looks like a path; a name that can only be meant as a path is not looked up on the network
    is_dataset = _DATASET_ID.fullmatch(source) and file_kind(path) is None and not path.parent.is_dir()
    if source == PYTHON_DOCS or is_dataset:
        return SourceFiles(path.parent)
    raise _unsupported(source, "no such file or folder")


def unpacked_chunks(path: Path, packed: str) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked, in pieces of bounded size.

    Raises:
        DataError: The file cannot be read to its end.
        UsageError: The package that unpacks it is not installed.
    """
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if packed == ".zst":
        errors += (optional_package("zstandard").ZstdError,)
    num_bytes = 0
    try:
        if packed and not path.stat().st_size:  # Python's gzip takes it for the archive of an empty file
            raise EOFError("no byte at all")
        for chunk in _zstd_chunks(path) if packed == ".zst" else _chunks(path, packed):
            num_bytes += len(chunk)
            yield chunk
    except errors as error:
        raise malformed(f"{path}, after {num_bytes} unpacked bytes", "a readable file", str(error)) from error


def check_digest(path: Path, root: Path) -> None:
    """Compare a file with the SHA-256 that stands beside it or at the root of its source, if one does.

    Raises:
        DataError: They differ, the digest of its own is for other files, or a file cannot be read.
    """
    expected = _digest_of(path, root)
    if expected is None:
        return
    try:
        found = file_sha256(path)
    except OSError as error:
        raise malformed(str(path), "a readable file", error.strerror or str(error)) from error
    if found != expected:
        raise malformed(str(path), f"the SHA-256 {expected} that stands beside it", found)


def _digest_of(path: Path, root: Path) -> str | None:
    """Return the SHA-256 that NAME.sha256, which may hold a bare digest, or SHA256SUMS gives for a file."""
    own = path.with_name(path.name + _DIGEST_SUFFIX)
    if own.is_file():
        for digest, name in _read_digests(own):
            # with the folder in which sha256sum was run, which need not be this one
            if name.rpartition("/")[2] in {path.name, ""}:
                return digest
        raise malformed(str(own), f"the SHA-256 of {path.name}", "none")
    for folder in (path.parent, root):
        if (folder / _DIGESTS_NAME).is_file():
            for digest, name in _read_digests(folder / _DIGESTS_NAME):
                if name == path.relative_to(folder).as_posix():
                    return digest
    return None


def _read_digests(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each digest of a file and the name that it is for; empty if it names none."""
    try:
        with file.open(encoding="utf-8") as content:
            lines = content.read(_LARGEST_DIGESTS).splitlines()
    except (OSError, ValueError) as error:
        raise malformed(str(file), "lines of sha256sum", str(error)) from error
    for row, line in enumerate(lines, start=1):
        parts = _DIGEST_LINE.fullmatch(line.rstrip())
        if parts is not None:
            yield parts[1].lower(), (parts[2] or "").removeprefix("./")
        elif line.strip():
            raise malformed(f"{file}, row {row}", "a line of sha256sum", line)


def optional_package(module: str) -> ModuleType | Any:
    """Import a module of the extra `data`.

    Raises:
        UsageError: Not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"package {module.partition('.')[0]}",
            expected="to be installed, because the source needs it",
            found=str(error),
            remedy="run `pip install 'metatokens[data]'`",
        ) from error


def malformed(where: str, expected: str, found: str) -> DataError:
    """Return the error for a file or a row whose content is not what its name promises."""
    return DataError(where, expected=expected, found=found, remedy="repair or replace the file")


def _survey_folder(root: Path) -> SourceFiles:
    files: list[Path] = []
    left_out: defaultdict[str, list[Path]] = defaultdict(list)

    def leave_out_unreadable(error: OSError) -> None:
        left_out["unreadable folder"].append(Path(error.filename))

    for folder, folders, names in os.walk(root, onerror=leave_out_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink():
                left_out["linked folder"].append(path)
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.name == _DIGESTS_NAME or path.suffix == _DIGEST_SUFFIX:
                continue
            if file_kind(path) is None:
                left_out["file of another kind"].append(path)
            elif not path.is_file():
                left_out["broken link or special file"].append(path)
            else:
                files.append(path)
    text = [path for path in files if not _is_json(path)]
    if text:
        left_out[".json file beside other text"] = [path for path in files if _is_json(path)]
    return SourceFiles(
        root,
        tuple(sorted(text or files, key=lambda path: path.relative_to(root).as_posix())),
        tuple(_describe(reason, paths, root) for reason, paths in sorted(left_out.items()) if paths),
    )


def _is_json(path: Path) -> bool:
    kind = file_kind(path)
    return kind is not None and kind.suffix == ".json"


def _describe(reason: str, paths: list[Path], root: Path) -> str:
    names = [repr(path.relative_to(root).as_posix()) for path in sorted(paths)[:_NAMED]]
    more = ["..."] if len(paths) > _NAMED else []
    return f"{len(paths)} x {reason} ({', '.join(names + more)})"


def _chunks(path: Path, packed: str) -> Iterator[bytes]:
    unpack: dict[str, Any] = {"": Path.open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with unpack[packed](path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # a decompression object, because the library's stream reader takes a truncated frame for a complete one
    decompressor = optional_package("zstandard").ZstdDecompressor(max_window_size=_ZSTD_LONGEST_WINDOW)
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


def _unsupported(source: str, found: str) -> DataError:
    known = f"{', '.join(_TEXT_SUFFIXES)} (packed or not: {', '.join(_PACKED_SUFFIXES)}) or {_PARQUET_SUFFIX}"
    return DataError(
        source,
        expected=f"a file or folder of {known}, {PYTHON_DOCS}, or the owner/name of a dataset",
        found=found,
        remedy="check the spelling",
    )
