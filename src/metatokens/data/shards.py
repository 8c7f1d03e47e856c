"""Tokens on disk: the format `tokens`, version 1, and its verified reader (`shard_writer` writes it).

    NAME/
      manifest.json          written last: the folder is a dataset only if it is there
      train-00000.ds         raw little-endian uint16 or uint32 ids, no header, each document ended by eos
      train-00000.ds.index   little-endian uint64, the end of each document in tokens of this shard
      validation-00000.ds    and its index
      tokenizer.json         the text tokenizer, which has no meta-token

The `.ds` and `.index` files have datatrove's layout. The manifest holds the size and SHA-256 of every file and, at its
head, the SHA-256 of its own text, but no time, host or absolute path. `content_id` is the SHA-256 of everything that
determines the tokens; checkpoints record it. Files are read with pread: if one is truncated while a job runs, the short
read can be reported, where a memory map would end the process with SIGBUS. Meta-tokens are never stored (see
`injection`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import weakref
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metatokens.data.tokenizer import MAX_TOKENIZER_BYTES, tokenizer_from_json
from metatokens.errors import DataError, UsageError, printable
from metatokens.storage import file_sha256, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokenizers import Tokenizer

FORMAT: Final = "tokens"
VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
INDEX_SUFFIX = ".index"

Split: TypeAlias = Literal["train", "validation"]
TokenDtype: TypeAlias = Literal["uint16", "uint32"]
TokenArray: TypeAlias = npt.NDArray[np.integer]

_MAX_MANIFEST_BYTES = 64 << 20
_PREPARE_AGAIN = "run `metatokens prepare` again"
_PLAIN_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
_HEX_SHA256 = r"^[0-9a-f]{64}$"

_log = logging.getLogger(__name__)

_Sha256 = Annotated[str, Field(pattern=_HEX_SHA256)]
_Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ShardEntry(_Frozen):
    """One shard of one split."""

    name: Annotated[str, Field(pattern=_PLAIN_NAME)]
    """File name in the folder; its index has `.index` appended."""
    split: Split
    bytes: _Count
    sha256: _Sha256
    index_sha256: _Sha256
    num_tokens: Annotated[int, Field(ge=1)]
    num_documents: Annotated[int, Field(ge=1)]
    first_document: _Count
    """How many documents of the split the shards before this one hold."""
    min_id: _Count
    max_id: _Count


class SourceFile(_Frozen):
    """A file that the tokens came from."""

    name: str
    """Path relative to the source folder."""
    bytes: _Count
    sha256: _Sha256


class Manifest(_Frozen):
    """What a folder of token shards holds."""

    format: Literal["tokens"] = FORMAT
    version: Literal[1] = VERSION
    dtype: TokenDtype
    byteorder: Literal["little"] = "little"
    tokenizer_sha256: _Sha256
    vocab_size: Annotated[int, Field(ge=1)]
    """V: every text id is below it, and it is the id of the meta-token."""
    eos_token_id: _Count
    num_documents_empty: _Count = 0
    num_documents_skipped: _Count = 0
    num_documents_replaced: _Count = 0
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    split_rule: str
    source: str
    """Name of the source, without its parent folders."""
    source_files: tuple[SourceFile, ...] = ()
    options: dict[str, str | int | float | None] = Field(default_factory=dict)
    """How the source was read and the shards were cut."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of the packages that made the tokens."""
    shards: tuple[ShardEntry, ...]
    """In reading order; the shards of each split form one sequence."""
    content_id: _Sha256
    """`compute_content_id` of the entries above."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [shard.name for shard in self.shards]
        item_bytes = np.dtype(self.dtype).itemsize
        if len(set(names)) < len(names):
            raise ValueError("two shards have one name")
        for shard in self.shards:
            if shard.bytes != shard.num_tokens * item_bytes:
                raise ValueError(f"{shard.name} has {shard.bytes} bytes for {shard.num_tokens} tokens of {self.dtype}")
            if shard.max_id >= self.vocab_size:
                raise ValueError(f"{shard.name} has max_id {shard.max_id}, beyond vocab_size {self.vocab_size}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is beyond vocab_size {self.vocab_size}")
        content_id = compute_content_id(
            self.dtype, self.tokenizer_sha256, self.vocab_size, self.eos_token_id, self.shards
        )
        if self.content_id != content_id:
            raise ValueError("content_id does not match the entries")
        return self

    def to_json(self) -> str:
        """Return the text of `manifest.json`, sealed; equal manifests give equal bytes."""
        return seal(json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")


def compute_content_id(
    dtype: TokenDtype, tokenizer_sha256: str, vocab_size: int, eos_token_id: int, shards: Iterable[ShardEntry]
) -> str:
    """Return the hex SHA-256 of the canonical JSON of everything that determines the tokens."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "shards": [[s.split, s.name, s.num_tokens, s.sha256, s.index_sha256] for s in shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TokenDataset:
    """A verified folder of token shards.

    Open one with `TokenDataset.open`; use it as a context manager, or leave closing to the garbage collector.
    Reading is safe from several threads.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._descriptors: dict[str, int] = {}
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        self._shards = {split: [s for s in manifest.shards if s.split == split] for split in ("train", "validation")}
        self._ends = {split: list(accumulate(s.num_tokens for s in shards)) for split, shards in self._shards.items()}

    @classmethod
    def open(cls, path: str | Path, verify: Literal["full", "size"] = "full") -> TokenDataset:
        """Open a folder made by `metatokens prepare`.

        Args:
            path: The folder.
            verify: "full" compares the SHA-256 of every shard and index (about 1 GB/s), "size" only their lengths.
                The manifest and the tokenizer are always checked.

        Raises:
            DataError: The manifest is missing, altered or of a newer version; or a shard, an index or the tokenizer
                is missing, altered or of the wrong size.
        """
        dataset = cls(Path(path), read_manifest(Path(path)))
        try:
            dataset._open_shards()
            if verify == "full":
                dataset.verify_hashes()
        except BaseException:
            dataset.close()
            raise
        return dataset

    def verify_hashes(self, share: tuple[int, int] = (0, 1)) -> None:
        """Compare the SHA-256 of the shards and their indices with the manifest.

        Args:
            share: Index and number of the processes that divide the work among them.

        Raises:
            DataError: One differs.
        """
        own, number = share
        for shard in self.manifest.shards[own::number]:
            index = shard.name + INDEX_SUFFIX
            opened = os.dup(self._descriptors[shard.name])  # the very file that will be read
            os.lseek(opened, 0, os.SEEK_SET)
            for name, file, sha256 in (
                (shard.name, opened, shard.sha256),
                (index, _open_regular(self.path / index), shard.index_sha256),
            ):
                with _unreadable(self.path / name):
                    digest = file_sha256(file)
                if digest != sha256:
                    raise _broken(self.path / name, f"SHA-256 {sha256[:12]}...", "another digest")

    @property
    def content_id(self) -> str:
        """The identity of the tokens; equal for equal sources, options and tokenizer."""
        return self.manifest.content_id

    @property
    def vocab_size(self) -> int:
        """V, the text vocabulary with its end-of-text token."""
        return self.manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The id after every document."""
        return self.manifest.eos_token_id

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens of a split, ends of text included."""
        return self._ends[split][-1] if self._ends[split] else 0

    def tokenizer(self) -> Tokenizer:
        """Return the text tokenizer that made the tokens."""
        return tokenizer_from_json(self._tokenizer_json(), str(self.path / TOKENIZER_NAME))

    def read(self, split: Split, start: int, count: int) -> TokenArray:
        """Return tokens [start, start + count) of a split, (count,) uint16 or uint32; the range may span shards.

        Raises:
            ValueError: The range is not inside the split.
            DataError: A shard has become shorter since it was opened, or cannot be read.
        """
        ends = self._ends[split]
        if start < 0 or count < 0 or start + count > self.num_tokens(split):
            raise ValueError(f"tokens [{start}, {start + count}) of {split} are not in [0, {self.num_tokens(split)})")
        pieces: list[TokenArray] = []
        shard_index = bisect_right(ends, start)
        while count:
            shard = self._shards[split][shard_index]
            offset = start - (ends[shard_index] - shard.num_tokens)
            piece = self._read_shard(shard, offset, min(count, shard.num_tokens - offset))
            pieces.append(piece)
            start, count, shard_index = start + len(piece), count - len(piece), shard_index + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.manifest.dtype)

    def close(self) -> None:
        """Close all files; reading is then an error."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_shard(self, shard: ShardEntry, offset: int, count: int) -> TokenArray:
        descriptor = self._descriptors[shard.name]
        num_bytes, at = count * self._dtype.itemsize, offset * self._dtype.itemsize
        content = b""
        # one call reads everything, unless the range is longer than the kernel's limit of 2 GiB
        while len(content) < num_bytes:
            with _unreadable(self.path / shard.name):
                piece = os.pread(descriptor, num_bytes - len(content), at + len(content))
            if not piece:
                raise _broken(self.path / shard.name, f"{shard.bytes} bytes", f"{os.fstat(descriptor).st_size} bytes")
            content += piece
        ids: TokenArray = np.frombuffer(content, dtype=self._dtype).astype(self.manifest.dtype, copy=False)
        return ids

    def _open_shards(self) -> None:
        """Open the shards, and check the length of each and of its index, and the tokenizer."""
        self._tokenizer_json()
        known = {MANIFEST_NAME, TOKENIZER_NAME}
        for shard in self.manifest.shards:
            index = shard.name + INDEX_SUFFIX
            known |= {shard.name, index}
            for name, size in ((shard.name, shard.bytes), (index, shard.num_documents * 8)):
                descriptor = _open_regular(self.path / name)
                self._descriptors[name] = descriptor
                found = os.fstat(descriptor).st_size
                if found != size:
                    raise _broken(self.path / name, f"{size} bytes", f"{found} bytes")
            os.close(self._descriptors.pop(index))
        for extra in sorted({entry.name for entry in self.path.iterdir()} - known):
            _log.warning("%s: not in %s, ignored", printable(str(self.path / extra)), MANIFEST_NAME)

    def _tokenizer_json(self) -> bytes:
        path = self.path / TOKENIZER_NAME
        content = _read_regular(path, MAX_TOKENIZER_BYTES)
        found = hashlib.sha256(content).hexdigest()
        if found != self.manifest.tokenizer_sha256:
            raise _broken(path, f"SHA-256 {self.manifest.tokenizer_sha256[:12]}...", f"{found[:12]}...")
        return content


def require_path(path: Path | None) -> Path:
    """Return the path of the tokens of a run.

    Raises:
        UsageError: it is not set.
    """
    if path is None:
        raise UsageError(
            "data.path",
            expected="a folder of tokens",
            found="none",
            remedy="run `metatokens prepare` and pass --data.path DIR",
        )
    return path


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder made by `metatokens prepare`; the shards are not looked at.

    Raises:
        DataError: the manifest is missing, altered or of a newer version.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise DataError(
            str(folder),
            expected=f"a folder with {MANIFEST_NAME}",
            found="none" if folder.is_dir() else "no such folder",
            remedy="make one with `metatokens prepare SOURCE --out DIR`",
        )
    try:
        text = _read_regular(path, _MAX_MANIFEST_BYTES).decode()
        values = json.loads(unseal(text, str(path), remedy=_PREPARE_AGAIN))
    except (ValueError, RecursionError) as error:
        raise _broken(path, "JSON", str(error)) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise _broken(path, f"format {FORMAT!r}", "another format")
    version = values.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DataError(
            str(path),
            expected=f"version {VERSION} or older",
            found=str(version),
            remedy="update metatokens, or prepare the data with this version",
        )
    if "content_id" not in values:
        raise _broken(path, "a content_id", "none")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise _broken(path, "the entries that `metatokens prepare` writes", f"{where}: {first['msg']}") from error


def _open_regular(path: Path) -> int:
    """Open a regular file for reading; a symbolic link, a device or a pipe is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _broken(path, "a readable regular file", error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _broken(path, "a regular file", "a device, pipe or folder")
    return descriptor


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Name the file that a disk could not read."""
    try:
        yield
    except OSError as error:
        raise _broken(path, "a readable file", error.strerror or str(error)) from error


def _read_regular(path: Path, max_bytes: int) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as file, _unreadable(path):
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise _broken(path, f"at most {max_bytes} bytes", f"{size} bytes")
        return file.read()


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _broken(path: Path, expected: str, found: str) -> DataError:
    return DataError(str(path), expected=expected, found=found, remedy=_PREPARE_AGAIN)
