"""Preparation: it tokenises a corpus into a folder of verified token shards.

The SHA-256 of a document's text decides its split, so a text and its copies are never in both; a corpus that is one
text file is cut in two (`splits`). `check` looks for every foreseeable error before anything is written. The shards
are written into a hidden folder beside `out`, which is renamed at the end: a dataset is complete or absent. After an
error or a kill the hidden folder keeps the finished shards, and the same command takes them over. Equal input,
options and tool versions give equal bytes, with any number of cores and after any number of kills.
"""

from __future__ import annotations

import errno
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

from metatokens.data.shard_writer import ShardWriter, holds_finished_shards, remove_markers
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
from metatokens.data.source_files import source_files, survey_source
from metatokens.data.sources import SourceCounts, SourceOptions, iterate_documents
from metatokens.data.splits import is_cut, require_splits, split_documents, split_of, split_rule
from metatokens.data.tokenizer import (
    TextEncoder,
    build_hf_tokenizer,
    load_text_tokenizer,
    text_vocab_size,
    train_tokenizer,
)
from metatokens.errors import FULL_DISK, MetaTokensError, ResourceError, UsageError
from metatokens.storage import commit, file_sha256, hold_lock, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenizers import Tokenizer

    from metatokens.data.splits import SplitDocument

__all__ = ["check", "prepare", "split_of"]

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
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Tokenise a source into `out` and return the manifest.

    Args:
        source: As for `iterate_documents`. It is read twice if the tokenizer is trained.
        out: The folder to make; it must not exist, or be empty. A link is followed.
        tokenizer: As for `load_text_tokenizer`; None trains one on the first 64 MiB of the source's training
            documents.
        vocab_size: Size of a trained vocabulary; not used with `tokenizer`.
        validation_fraction: Share of the documents, in [0, 1), that goes to the validation split; of one text file,
            the share of its characters.
        shard_tokens: A shard that has reached this many tokens is closed.
        options: How the source is read.
        dtype: Type of the ids on disk; None takes uint16 if the vocabulary fits.
        progress: Called after every batch with the UTF-8 bytes of text and the tokens written so far.
        say: Called with a line of text before each long part of the work.

    Raises:
        ValueError: `validation_fraction` or `shard_tokens` is out of range.
        UsageError: `out` is taken, cannot be written or is being made by another process.
        DataError: The input is bad, or a split gets no document.
        ResourceError: The disk is full.

    Once a shard is finished, each of these errors says where the finished shards are kept.
    """
    given = check(
        source,
        out,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        options=options,
    )
    out = out.resolve()
    if is_cut(source, validation_fraction):
        say(f"{source} is one text file: the last {validation_fraction:.4g} of it is the validation split")
    try:
        with _exclusive(out) as folder:
            if given is None:
                say(f"training a tokenizer of at most {vocab_size:,} tokens on {source}")
            text_tokenizer = given or _train(source, vocab_size, validation_fraction, options)
            say(f"tokenising {source} with a vocabulary of {text_vocab_size(text_tokenizer):,} tokens")
            manifest = _write(
                folder, source, text_tokenizer, validation_fraction, shard_tokens, options, dtype, progress
            )
            remove_markers(folder)
            commit(folder, out)
    except OSError as error:
        raise _disk_error(out, error) from error
    return manifest


def check(
    source: str,
    out: Path,
    *,
    tokenizer: str | None,
    validation_fraction: float,
    shard_tokens: int,
    options: SourceOptions,
) -> Tokenizer | None:
    """Raise the errors that `prepare` can foresee, and write nothing; returns the tokenizer if `tokenizer` names one.

    Reads documents until each split has one. Warns of files in the source folder that are not read.

    Raises:
        UsageError, DataError: see `prepare`.
    """
    _check_arguments(validation_fraction, shard_tokens)
    _check_place(out)
    _check_free(out)
    source_files(source)
    text_tokenizer = None if tokenizer is None else load_text_tokenizer(tokenizer)
    if text_tokenizer is not None:
        TextEncoder(text_tokenizer)
        build_hf_tokenizer(text_tokenizer)  # the tokenizer of a model trained on these tokens
    require_splits(source, options, validation_fraction)
    return text_tokenizer


def _check_arguments(validation_fraction: float, shard_tokens: int) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")


def _check_place(out: Path) -> None:
    """Refuse a path at which the finished folder could not be put."""
    try:
        place = out.resolve()
        _partial_folder(place).exists()
        existing = next(path for path in place.parents if path.exists())
    except OSError as error:  # a name too long, a folder that may not be entered
        raise _disk_error(out, error) from error
    except RuntimeError as error:
        raise _disk_error(out, OSError(errno.ELOOP, os.strerror(errno.ELOOP))) from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EACCES if existing.is_dir() else errno.ENOTDIR
        raise _disk_error(out, OSError(number, os.strerror(number)))
    if place.is_mount():
        raise UsageError(
            str(out),
            expected="a folder that the finished one can replace",
            found="the root of a mounted disk",
            remedy=f"choose a folder in it, such as {out / 'tokens'}",
        )


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a prepared dataset" if (out / MANIFEST_NAME).exists() else "other files"
        raise UsageError(
            str(out), expected="a folder that does not exist", found=what, remedy="choose another, or remove it"
        )


def _train(source: str, vocab_size: int, validation_fraction: float, options: SourceOptions) -> Tokenizer:
    def sample() -> Iterator[str]:
        num_bytes = 0
        documents = iterate_documents(source, options)
        for split, document in split_documents(source, documents, validation_fraction):
            if split == "train":
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
        (folder / name).unlink(missing_ok=True)  # left by a run that was killed at its very end
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
    documents = split_documents(source, iterate_documents(source, options, counts), validation_fraction)
    shards = _encode(documents, encoder, writers, progress)
    write_durably(folder / TOKENIZER_NAME, tokenizer.to_str().encode())
    found = survey_source(source)
    manifest = Manifest(
        dtype=dtype,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        num_documents_empty=counts.empty,
        num_documents_skipped=counts.skipped,
        num_documents_replaced=counts.replaced,
        validation_fraction=validation_fraction,
        split_rule=split_rule(source, validation_fraction),
        source=Path(source).name if found.files else source,
        source_files=tuple(
            SourceFile(
                name=path.relative_to(found.root).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path)
            )
            for path in found.files
        ),
        options=recorded_options,
        tools=tools,
        shards=shards,
        content_id=compute_content_id(dtype, encoder.sha256, encoder.vocab_size, encoder.eos_token_id, shards),
    )
    write_durably(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _encode(
    documents: Iterator[SplitDocument],
    encoder: TextEncoder,
    writers: dict[Split, ShardWriter],
    progress: Callable[[int, int], None] | None,
) -> tuple[ShardEntry, ...]:
    """Encode the documents that no finished shard holds, and return the entries of all shards."""
    num_bytes = 0
    try:
        for batch in _batches(documents):
            new = []
            for split, (text, _) in batch:
                content = text.encode()
                num_bytes += len(content)
                digest = hashlib.sha256(content).digest()
                writer = writers[split]
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
    """Choose the type by the size of the vocabulary, never by the ids that happen to occur."""
    fits = vocab_size <= np.iinfo(np.uint16).max
    if dtype == "uint16" and not fits:
        raise UsageError(
            "dtype uint16",
            expected=f"a vocabulary of at most {np.iinfo(np.uint16).max}",
            found=str(vocab_size),
            remedy="use uint32, or leave dtype out",
        )
    return dtype or ("uint16" if fits else "uint32")


def _batches(documents: Iterator[SplitDocument]) -> Iterator[list[SplitDocument]]:
    batch: list[SplitDocument] = []
    num_characters = 0
    for split, document in documents:
        batch.append((split, document))
        num_characters += len(document.text)
        if num_characters >= _BATCH_BYTES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def _exclusive(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, and keep other processes from `out`.

    After an error, a folder with finished work stays and the error names it; any other is removed.
    """
    lock = out.parent / f".{out.name}.lock"
    with hold_lock(lock, folder=out, work="another `metatokens prepare` is writing this folder"):
        try:
            _check_free(out)  # again, now that no other process can make it
            # the lock ends with its process, so a hidden folder that exists now was left by a killed or failed run
            folder = _partial_folder(out)
            if folder.is_symlink():
                raise _disk_error(folder, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except (MetaTokensError, OSError) as error:
                failure = _disk_error(out, error) if isinstance(error, OSError) else error
                _keep_finished_work(folder, failure)
                raise failure from error.__cause__
        finally:
            lock.unlink(missing_ok=True)


def _partial_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _keep_finished_work(folder: Path, error: MetaTokensError) -> None:
    """Add to the error's message where the finished shards are kept; remove a folder that has none."""
    if (folder / MANIFEST_NAME).exists():
        kept = f"the finished dataset is kept in {folder}: rename it"
    elif holds_finished_shards(folder):
        kept = f"the finished shards are kept in {folder}, and the same command takes them over"
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return
    error.args = (f"{error}; {kept}",)


def _disk_error(out: Path, error: OSError) -> MetaTokensError:
    if error.errno in FULL_DISK:
        free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
        return ResourceError(
            str(out),
            expected="room for the token shards",
            found=f"{error.strerror}, {free} bytes free",
            remedy="free some disk or choose another --out",
        )
    return UsageError(
        str(out),
        expected="a folder that can be made and written",
        found=error.strerror or str(error),
        remedy="choose another --out",
    )
