"""A corpus into a folder of verified token shards.

Documents go to a split by the SHA-256 of their text, so that a text and its copies are never on both sides. All
is written into a hidden sibling folder that is renamed at the end: under its final name a dataset is complete or
absent. An error removes the hidden folder; a run that is killed leaves it, and the same command takes its finished
shards over. Equal input, options and tool versions give equal bytes, whatever the number of cores and of kills.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.shard_writer import ShardWriter, remove_markers, write_durably
from metatokens.data.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SourceFile,
    Split,
    TokenDtype,
    compute_content_id,
)
from metatokens.data.sources import Document, SourceCounts, SourceOptions, file_sha256, iterate_documents, source_files
from metatokens.data.tokenizer import TextEncoder, load_text_tokenizer, train_tokenizer
from metatokens.errors import FULL_DISK, DataError, MetaTokensError, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenizers import Tokenizer

SPLIT_RULE = "validation where the first 8 bytes of SHA-256(UTF-8 text), big-endian, < validation_fraction * 2^64"
TOKENIZER_SAMPLE_BYTES = 64 << 20  # a byte-level BPE gains little from more, and its training holds the sample

_BATCH_BYTES = 4 << 20  # text handed to the encoder at once: enough documents for every core
_TOOLS = ("metatokens", "numpy", "tokenizers", "tiktoken")


def prepare(
    source: str,
    out: Path,
    *,
    tokenizer: str | None,
    vocab_size: int,
    validation_fraction: float,
    shard_tokens: int,
    options: SourceOptions,
    dtype: TokenDtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Tokenise a source into `out` and return the manifest.

    Args:
        source: As for `iterate_documents`. It is read twice if the tokenizer is trained.
        out: The folder to make; it must not exist, or be empty.
        tokenizer: As for `load_text_tokenizer`; None trains one on the first 64 MiB of the source's training
            documents.
        vocab_size: Size of a trained vocabulary; not used with `tokenizer`.
        validation_fraction: Share of the documents, in [0, 1), that goes to the validation split.
        shard_tokens: A shard that has reached this many tokens is closed.
        options: How the source is read.
        dtype: Type of the ids on disk; None takes uint16 where the vocabulary fits.
        progress: Called after every batch with the UTF-8 bytes of text and the tokens written so far.

    Raises:
        UsageError: A wrong argument, `out` is taken, cannot be written or is being made by another process.
        DataError: Bad input, or a split that gets no document.
        ResourceError: The disk is full; nothing stays behind.
    """
    given = check(source, out, tokenizer=tokenizer, validation_fraction=validation_fraction, shard_tokens=shard_tokens)
    try:
        with _exclusive(out) as folder:
            text_tokenizer = given or _train(source, vocab_size, validation_fraction, options)
            manifest = _write(
                folder, source, text_tokenizer, validation_fraction, shard_tokens, options, dtype, progress
            )
            remove_markers(folder)
            _flush_folder(folder)
            os.replace(folder, out)
            _flush_folder(out.parent)
    except OSError as error:
        raise _disk_error(out, error) from error
    return manifest


def check(
    source: str, out: Path, *, tokenizer: str | None, validation_fraction: float, shard_tokens: int
) -> Tokenizer | None:
    """Raise what `prepare` would before it reads the text, and write nothing; returns the tokenizer if one is named.

    Raises:
        UsageError, DataError: see `prepare`.
    """
    _check_arguments(validation_fraction, shard_tokens)
    _check_free(out)
    existing = next(path for path in out.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EACCES if existing.is_dir() else errno.ENOTDIR
        raise _disk_error(out, OSError(number, os.strerror(number)))
    source_files(source)
    return None if tokenizer is None else load_text_tokenizer(tokenizer)


def split_of(text: str, validation_fraction: float) -> Split:
    """Return the split of a document, a function of its text alone (see `SPLIT_RULE`)."""
    return _split_of(hashlib.sha256(text.encode()).digest(), validation_fraction)


def _split_of(text_sha256: bytes, validation_fraction: float) -> Split:
    draw = int.from_bytes(text_sha256[:8], "big")
    return "validation" if draw < int(validation_fraction * 2**64) else "train"


def _check_arguments(validation_fraction: float, shard_tokens: int) -> None:
    if not 0 <= validation_fraction < 1:
        raise UsageError(
            "validation_fraction",
            expected="a share in [0, 1)",
            found=str(validation_fraction),
            remedy="0.005 is common for a large corpus",
        )
    if shard_tokens < 1:
        raise UsageError("shard_tokens", expected="at least 1", found=str(shard_tokens), remedy="raise it")


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a prepared dataset" if (out / MANIFEST_NAME).exists() else "other files"
        raise UsageError(
            str(out), expected="a folder that does not exist", found=what, remedy="choose another, or remove it"
        )


def _train(source: str, vocab_size: int, validation_fraction: float, options: SourceOptions) -> Tokenizer:
    def sample() -> Iterator[str]:
        num_bytes = 0
        for document in iterate_documents(source, options):
            if split_of(document.text, validation_fraction) == "train":
                yield document.text
                num_bytes += len(document.text.encode())
                if num_bytes >= TOKENIZER_SAMPLE_BYTES:
                    break

    return train_tokenizer(sample(), vocab_size)


def _write(
    folder: Path,
    source: str,
    tokenizer: Tokenizer,
    validation_fraction: float,
    shard_tokens: int,
    options: SourceOptions,
    dtype: TokenDtype | None,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    for name in (TOKENIZER_NAME, MANIFEST_NAME):
        (folder / name).unlink(missing_ok=True)  # of a run that was killed at its very end
    encoder = TextEncoder(tokenizer)
    dtype = _dtype(encoder.vocab_size, dtype)
    counts = SourceCounts()
    recorded_options = asdict(options) | {"shard_tokens": shard_tokens}
    tools = {"python": platform.python_version()} | {name: _version(name) for name in _TOOLS}
    plan = json.dumps([source, dtype, encoder.sha256, validation_fraction, recorded_options, tools])
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(
            folder,
            split,
            dtype=dtype,
            shard_tokens=shard_tokens,
            vocab_size=encoder.vocab_size,
            eos_token_id=encoder.eos_token_id,
            plan=plan,
        )
        for split in ("train", "validation")
    }
    shards = _encode(iterate_documents(source, options, counts), encoder, writers, validation_fraction, progress)
    _require_documents(source, {shard.split for shard in shards}, validation_fraction, counts)
    write_durably(folder / TOKENIZER_NAME, tokenizer.to_str().encode())
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    files = source_files(source)
    manifest = Manifest(
        dtype=dtype,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        num_documents_empty=counts.empty,
        num_documents_skipped=counts.skipped,
        num_documents_replaced=counts.replaced,
        validation_fraction=validation_fraction,
        split_rule=SPLIT_RULE,
        source=Path(source).name if files else source,
        source_files=tuple(
            SourceFile(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
            for path in files
        ),
        options=recorded_options,
        tools=tools,
        shards=shards,
        content_id=compute_content_id(dtype, encoder.sha256, encoder.vocab_size, encoder.eos_token_id, shards),
    )
    write_durably(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _encode(
    documents: Iterator[Document],
    encoder: TextEncoder,
    writers: dict[Split, ShardWriter],
    validation_fraction: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[ShardEntry, ...]:
    """Encode what no shard holds yet, and return the entries of all shards."""
    num_bytes = 0
    try:
        for batch in _batches(documents):
            new = []
            for text, _ in batch:
                content = text.encode()
                num_bytes += len(content)
                digest = hashlib.sha256(content).digest()
                writer = writers[_split_of(digest, validation_fraction)]
                if not writer.passes(digest):
                    new.append((text, digest, writer))
            for (_, digest, writer), ids in zip(new, encoder.encode_batch([text for text, *_ in new]), strict=True):
                writer.add(ids, digest)
            if progress is not None:
                progress(num_bytes, sum(writer.num_tokens for writer in writers.values()))
        return tuple(entry for writer in writers.values() for entry in writer.close())
    finally:
        for writer in writers.values():
            writer.abandon()


def _dtype(vocab_size: int, dtype: TokenDtype | None) -> TokenDtype:
    """Choose the type from the vocabulary, never from the ids that happen to occur."""
    fits = vocab_size <= np.iinfo(np.uint16).max
    if dtype == "uint16" and not fits:
        raise UsageError(
            "dtype uint16",
            expected=f"a vocabulary of at most {np.iinfo(np.uint16).max}",
            found=str(vocab_size),
            remedy="use uint32, or leave dtype out",
        )
    return dtype or ("uint16" if fits else "uint32")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _BATCH_BYTES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _require_documents(source: str, found: set[Split], validation_fraction: float, counts: SourceCounts) -> None:
    wanted: list[Split] = ["train", "validation"] if validation_fraction else ["train"]
    for split in wanted:
        if split not in found:
            raise DataError(
                source,
                expected=f"at least one document in the {split} split",
                found=f"none of {counts.documents} documents ({counts.empty} empty, {counts.skipped} skipped)",
                remedy="use more documents, or another validation_fraction (0 for no validation split)",
            )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _exclusive(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, removed on an error, and keep other processes from `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock_path = out.parent / f".{out.name}.lock"
    lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process that held it before may just have removed the file, and another made a new one
            held = os.path.samestat(os.fstat(lock), lock_path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UsageError(
                str(out),
                expected="no other process that makes it",
                found=f"a lock on {lock_path.name}",
                remedy="wait for it to end",
            )
        try:
            _check_free(out)  # again, now that no other process can make it
            # the lock dies with its process, so a folder that is still there belongs to one that was killed
            folder = out.parent / f".{out.name}.partial"
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except Exception:
                # an error would come again; a kill or Ctrl-C leaves the finished shards to the next try
                shutil.rmtree(folder, ignore_errors=True)
                raise
        finally:
            lock_path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(out: Path, error: OSError) -> MetaTokensError:
    if error.errno in FULL_DISK:
        free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
        return ResourceError(
            str(out),
            expected="room for the token shards",
            found=f"{error.strerror}, {free} bytes free",
            remedy="free some disk or choose another --out; nothing was left behind",
        )
    return UsageError(
        str(out),
        expected="a folder that can be made and written",
        found=error.strerror or str(error),
        remedy="choose another --out",
    )
