"""Preparation: it tokenises a corpus into a folder of verified token shards.

The SHA-256 of a document's text decides its split, so a text and its copies are never in both; a corpus that is one
text file is cut in two (`splits`). `check` looks for every foreseeable error before anything is written. The shards
are written into a hidden folder beside `out`, which is renamed at the end: a dataset is complete or absent. After an
error or a kill the hidden folder keeps the finished shards, and the same command takes them over. Equal input,
options and tool versions give equal bytes, with any number of cores and processes and after any number of kills.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metatokens.data.encoding_processes import encode_batches, encode_batches_in_processes
from metatokens.data.new_dataset import check_free, check_place, disk_error, locked, tool_versions, unfinished
from metatokens.data.shard_writer import ShardWriter, remove_markers
from metatokens.data.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SourceFile,
    Split,
    TokenDtype,
    compute_content_id,
    read_manifest,
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
from metatokens.errors import UsageError
from metatokens.storage import commit, file_sha256, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenizers import Tokenizer

    from metatokens.data.byte_level import TokenIds
    from metatokens.data.splits import SplitDocument

__all__ = ["check", "prepare", "split_of"]

TOKENIZER_SAMPLE_BYTES = 64 << 20  # a byte-level BPE gains little from more, and its training holds the sample

_BATCH_CHARACTERS = 4 << 20  # text handed to the encoder at once: enough documents for every core


def prepare(  # noqa: PLR0913 every choice that the tokens depend on, and how the work is done
    source: str,
    out: Path,
    *,
    tokenizer: str | None,
    vocab_size: int,
    validation_fraction: float,
    shard_tokens: int,
    options: SourceOptions,
    dtype: TokenDtype | None = None,
    jobs: int = 1,
    wait: bool = False,
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
        jobs: Processes that encode; with 1 this process encodes itself, with a thread for each core. The bytes do not
            depend on it.
        wait: Wait for another process that makes `out`. A finished `out` of the same source, tokenizer and options is
            then the result.
        progress: Called after every batch with the UTF-8 bytes of text and the tokens written so far.
        say: Called with a line of text before each long part of the work.

    Raises:
        ValueError: `validation_fraction`, `shard_tokens` or `jobs` is out of range.
        UsageError: `out` is taken, cannot be written or is being made by another process.
        DataError: The input is bad, or a split gets no document.
        ResourceError: The disk is full, or an encoding process has ended.

    Once a shard is finished, each of these errors says where the finished shards are kept.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    given = check(
        source,
        out,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        options=options,
        may_be_finished=wait,
    )
    out = out.resolve()
    recorded = asdict(options) | {"shard_tokens": shard_tokens, "trained_vocab_size": None if given else vocab_size}
    try:
        with locked(out, say if wait else None):
            if wait and (out / MANIFEST_NAME).exists():
                say(f"{out} is finished already")
                return _require_same(out, given, dtype, _origin(source, validation_fraction, recorded))
            with unfinished(out) as folder:
                if is_cut(source, validation_fraction):
                    say(f"{source} is one text file: the last {validation_fraction:.4g} of it is the validation split")
                if given is None:
                    say(f"training a tokenizer of at most {vocab_size:,} tokens on {source}")
                text_tokenizer = given or _train(source, vocab_size, validation_fraction, options)
                say(f"tokenising {source} with a vocabulary of {text_vocab_size(text_tokenizer):,} tokens")
                work = _Work(source, text_tokenizer, validation_fraction, options, recorded, jobs)
                manifest = _write(folder, work, dtype, progress)
                remove_markers(folder)
                commit(folder, out)
    except OSError as error:
        raise disk_error(out, error) from error
    return manifest


def check(
    source: str,
    out: Path,
    *,
    tokenizer: str | None,
    validation_fraction: float,
    shard_tokens: int,
    options: SourceOptions,
    may_be_finished: bool = False,
) -> Tokenizer | None:
    """Raise the errors that `prepare` can foresee, and write nothing; returns the tokenizer if `tokenizer` names one.

    Reads documents until each split has one. Warns of files in the source folder that are not read. With
    `may_be_finished`, `out` may be a finished dataset.

    Raises:
        UsageError, DataError: see `prepare`.
    """
    _check_arguments(validation_fraction, shard_tokens)
    check_place(out)
    if not (may_be_finished and (out / MANIFEST_NAME).exists()):
        check_free(out)
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


class _Work(NamedTuple):
    """What is tokenised, and how."""

    source: str
    tokenizer: Tokenizer
    validation_fraction: float
    options: SourceOptions
    recorded: dict[str, str | int | float | None]
    """The options in the manifest."""
    jobs: int


def _write(
    folder: Path, work: _Work, dtype: TokenDtype | None, progress: Callable[[int, int], None] | None
) -> Manifest:
    for name in (TOKENIZER_NAME, MANIFEST_NAME):
        (folder / name).unlink(missing_ok=True)  # left by a run that was killed at its very end
    encoder = TextEncoder(work.tokenizer)
    dtype = _dtype(encoder.vocab_size, dtype)
    counts = SourceCounts()
    tools = tool_versions()
    plan = json.dumps([work.source, dtype, encoder.sha256, work.validation_fraction, work.recorded, tools])
    writers: dict[Split, ShardWriter] = {
        split: ShardWriter(
            folder,
            split,
            dtype=dtype,
            shard_tokens=int(work.recorded["shard_tokens"] or 0),
            vocab_size=encoder.vocab_size,
            eos_token_id=encoder.eos_token_id,
            plan=plan,
        )
        for split in ("train", "validation")
    }
    documents = iterate_documents(work.source, work.options, counts)
    batches = _batches(split_documents(work.source, documents, work.validation_fraction), writers)
    tokenizer_json = work.tokenizer.to_str().encode()
    encoded = (
        encode_batches(batches, encoder)
        if work.jobs == 1
        else encode_batches_in_processes(batches, tokenizer_json, work.jobs)
    )
    with closing(encoded):
        shards = _write_shards(encoded, writers, progress)
    write_durably(folder / TOKENIZER_NAME, tokenizer_json)
    manifest = Manifest(
        dtype=dtype,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        num_documents_empty=counts.empty,
        num_documents_skipped=counts.skipped,
        num_documents_replaced=counts.replaced,
        tools=tools,
        shards=shards,
        content_id=compute_content_id(dtype, encoder.sha256, encoder.vocab_size, encoder.eos_token_id, shards),
        **_origin(work.source, work.validation_fraction, work.recorded),
    )
    write_durably(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _origin(source: str, validation_fraction: float, recorded: dict[str, str | int | float | None]) -> dict[str, Any]:
    """Return the entries of the manifest that tell what the tokens are made of, but for the tokenizer."""
    found = survey_source(source)
    return {
        "validation_fraction": validation_fraction,
        "split_rule": split_rule(source, validation_fraction),
        "source": Path(source).name if found.files else source,
        "source_files": tuple(
            SourceFile(
                name=path.relative_to(found.root).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path)
            )
            for path in found.files
        ),
        "options": recorded,
    }


def _require_same(out: Path, given: Tokenizer | None, dtype: TokenDtype | None, origin: dict[str, Any]) -> Manifest:
    """Return the manifest of a finished dataset.

    Raises:
        UsageError: It was made of something else, or in another way.
    """
    manifest = read_manifest(out)
    wanted = origin | ({} if dtype is None else {"dtype": dtype})
    if given is not None:
        wanted["tokenizer_sha256"] = TextEncoder(given).sha256
    different = [name for name, value in wanted.items() if getattr(manifest, name) != value]
    if different:
        raise UsageError(
            str(out),
            expected="a dataset of the same source, tokenizer and options",
            found=f"another {', '.join(different)}",
            remedy="choose another --out, or remove it",
        )
    return manifest


class _Batch(NamedTuple):
    """Documents that no finished shard holds."""

    texts: list[str]
    places: list[tuple[ShardWriter, bytes]]
    """For each text the writer that it goes to, and its SHA-256."""
    num_bytes: int
    """Bytes of text up to here, those of finished shards included."""


def _batches(documents: Iterator[SplitDocument], writers: dict[Split, ShardWriter]) -> Iterator[_Batch]:
    texts: list[str] = []
    places: list[tuple[ShardWriter, bytes]] = []
    num_characters = num_bytes = 0
    for split, (text, _) in documents:
        content = text.encode()
        num_bytes += len(content)
        num_characters += len(text)
        digest = hashlib.sha256(content).digest()
        if not writers[split].passes(digest):
            texts.append(text)
            places.append((writers[split], digest))
        if num_characters >= _BATCH_CHARACTERS:
            yield _Batch(texts, places, num_bytes)
            texts, places, num_characters = [], [], 0
    if num_characters:
        yield _Batch(texts, places, num_bytes)


def _write_shards(
    encoded: Iterator[tuple[_Batch, list[TokenIds]]],
    writers: dict[Split, ShardWriter],
    progress: Callable[[int, int], None] | None,
) -> tuple[ShardEntry, ...]:
    """Write the documents in their order, and return the entries of all shards."""
    try:
        for batch, documents in encoded:
            for (writer, digest), ids in zip(batch.places, documents, strict=True):
                writer.add(ids, digest)
            if progress is not None:
                progress(batch.num_bytes, sum(writer.num_tokens for writer in writers.values()))
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
