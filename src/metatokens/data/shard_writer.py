"""The writer of token shards; it takes over the shards that an interrupted writer has finished.

Until the dataset is complete, each finished shard has a marker beside it, `NAME.done`. The marker holds the shard's
manifest entry, the plan that it was made by, and a digest of the documents up to its end. A writer with the same plan
takes these shards over: it skips their documents without encoding them again, and compares the digest.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from metatokens.data.shards import INDEX_SUFFIX, ShardEntry, Split, TokenArray, TokenDtype
from metatokens.errors import DataError
from metatokens.storage import file_sha256, flush_to_disk, write_durably

_DONE_SUFFIX = ".done"


class _Done(BaseModel):
    """The marker of a finished shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    documents_sha256: str
    entry: ShardEntry


class ShardWriter:
    """Writes the shards of one split into a folder; a document is never cut by the limit of a shard.

    Args:
        folder: Where the files go; files of the split that are not finished shards of the same plan are removed.
        split: Part of the file names and the entries.
        dtype: Type of the ids on disk.
        shard_tokens: A shard that has reached this many tokens is closed; the last document may exceed it.
        vocab_size: Bound of the ids.
        eos_token_id: Written after every document.
        plan: Identifies everything besides the documents that determines the shards.

    Attributes:
        num_tokens: Tokens of the split so far.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        *,
        dtype: TokenDtype,
        shard_tokens: int,
        vocab_size: int,
        eos_token_id: int,
        plan: str = "",
    ) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._shard_tokens, self._vocab_size, self._eos_token_id = shard_tokens, vocab_size, eos_token_id
        self._plan = plan
        self._documents = hashlib.sha256()
        done = self._take_over()
        self._entries = [finished.entry for finished in done]
        ends = list(accumulate(entry.num_documents for entry in self._entries))
        self._sha256_at = dict(zip(ends, (finished.documents_sha256 for finished in done), strict=True))
        self._first_document = ends[-1] if ends else 0
        self._num_passed = 0
        self._open: _OpenShard | None = None
        self.num_tokens = sum(entry.num_tokens for entry in self._entries)

    def passes(self, document_sha256: bytes) -> bool:
        """Tell whether a shard that was taken over holds the next document; if so, do not add it.

        Raises:
            DataError: The shard holds other documents, because the source has changed since.
        """
        if not self._sha256_at:
            return False
        self._num_passed += 1
        self._documents.update(document_sha256)
        if self._num_passed in self._sha256_at:
            self._check_passed(self._sha256_at.pop(self._num_passed) == self._documents.hexdigest())
        return True

    def add(self, ids: TokenArray, document_sha256: bytes = b"") -> None:
        """Append one document (length,) and its eos.

        Raises:
            DataError: An id does not fit the vocabulary or the type (ids never wrap around silently), or the document
                contains an eos.
        """
        largest = int(ids.max(initial=0))
        bound = min(self._vocab_size, int(np.iinfo(self._dtype).max) + 1)
        if largest >= bound or (ids == self._eos_token_id).any():
            raise DataError(
                "a document's token ids",
                expected=f"ids below {bound} and no end of text ({self._eos_token_id})",
                found=f"largest id {largest}, {int((ids == self._eos_token_id).sum())} ends of text",
                remedy="encode with metatokens.data.tokenizer.TextEncoder",
            )
        if self._open is None:
            self._open = _OpenShard(self._folder / f"{self._split}-{len(self._entries):05d}.ds", self._dtype)
        self._open.append(np.append(ids, self._eos_token_id))
        self._documents.update(document_sha256)
        self.num_tokens += len(ids) + 1
        if self._open.num_tokens >= self._shard_tokens:
            self._close_shard(self._open)

    def close(self) -> list[ShardEntry]:
        """Finish the last shard, flush all to the disk and return the entries for the manifest.

        Raises:
            DataError: The source has fewer documents than the shards that were taken over.
        """
        self._check_passed(not self._sha256_at)
        if self._open is not None:
            self._close_shard(self._open)
        return self._entries

    def abandon(self) -> None:
        """Close the open file without finishing the shard."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _close_shard(self, shard: _OpenShard) -> None:
        entry = shard.finish(self._split, self._first_document)
        done = _Done(plan=self._plan, documents_sha256=self._documents.hexdigest(), entry=entry)
        write_durably(self._folder / (entry.name + _DONE_SUFFIX), done.model_dump_json().encode())
        self._entries.append(entry)
        self._first_document += entry.num_documents
        self._open = None

    def _take_over(self) -> list[_Done]:
        """Return the markers of the leading shards that are whole, and remove the split's other files."""
        taken: list[_Done] = []
        kept: set[Path] = set()
        while done := self._read_done(self._folder / f"{self._split}-{len(taken):05d}.ds"):
            taken.append(done)
            kept |= {self._folder / (done.entry.name + suffix) for suffix in ("", INDEX_SUFFIX, _DONE_SUFFIX)}
        for path in set(self._folder.glob(f"{self._split}-*")) - kept:
            path.unlink()
        return taken

    def _read_done(self, shard: Path) -> _Done | None:
        index, marker = (shard.with_name(shard.name + suffix) for suffix in (INDEX_SUFFIX, _DONE_SUFFIX))
        try:
            done = _Done.model_validate_json(marker.read_bytes())
            is_whole = (file_sha256(shard), file_sha256(index)) == (done.entry.sha256, done.entry.index_sha256)
        except (OSError, ValidationError):
            return None
        return done if is_whole and done.plan == self._plan else None

    def _check_passed(self, are_equal: bool) -> None:
        if not are_equal:
            remove_markers(self._folder)  # or the next run would take over shards of other documents again
            raise DataError(
                f"{self._folder.name}, split {self._split}",
                expected="the documents that the interrupted run read",
                found="others",
                remedy="run the command again; it starts from the beginning",
            )


class _OpenShard:
    """A shard that is being written, and hashed as it grows."""

    def __init__(self, path: Path, dtype: TokenDtype) -> None:
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._ends: list[int] = []
        self._min_id, self._max_id = 2**32, 0
        self.num_tokens = 0

    def append(self, ids: TokenArray) -> None:
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._min_id, self._max_id = min(self._min_id, int(ids.min())), max(self._max_id, int(ids.max()))
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)

    def finish(self, split: Split, first_document: int) -> ShardEntry:
        flush_to_disk(self._file)
        self._file.close()
        index = np.array(self._ends, dtype="<u8").tobytes()
        write_durably(self._path.with_name(self._path.name + INDEX_SUFFIX), index)
        return ShardEntry(
            name=self._path.name,
            split=split,
            bytes=self.num_tokens * self._dtype.itemsize,
            sha256=self._sha256.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            num_tokens=self.num_tokens,
            num_documents=len(self._ends),
            first_document=first_document,
            min_id=self._min_id,
            max_id=self._max_id,
        )

    def abandon(self) -> None:
        # closing writes the buffer, which fails on a full disk and is not needed
        with suppress(OSError):
            self._file.close()


def holds_finished_shards(folder: Path) -> bool:
    """Tell whether a folder holds a shard that the next run with the same plan takes over."""
    return any(folder.glob(f"*{_DONE_SUFFIX}"))


def remove_markers(folder: Path) -> None:
    """Remove all markers of a folder, so that no later run takes its shards over."""
    for path in folder.glob(f"*{_DONE_SUFFIX}"):
        path.unlink()
