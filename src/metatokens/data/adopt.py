"""Adoption: it makes a dataset of token files that another package wrote, without encoding or, if it can, copying them.

The files become shards by hard links; where the disk allows none, or a header stands before the tokens, by copies. All
tokens are read once: their SHA-256 and range go into the manifest, so they are verified as shards of `prepare` are.
`token_files` has a reader for each format.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatokens.data.new_dataset import (
    check_free,
    check_place,
    check_unstarted,
    disk_error,
    locked,
    tool_versions,
    unfinished,
)
from metatokens.data.shards import (
    INDEX_SUFFIX,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SourceFile,
    Split,
    TokenDtype,
    compute_content_id,
)
from metatokens.data.token_files import READERS, TokenFile
from metatokens.data.tokenizer import TextEncoder, build_hf_tokenizer, load_text_tokenizer
from metatokens.errors import DataError, UsageError
from metatokens.storage import commit, flush_path, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from tokenizers import Tokenizer

_SUFFIXES = (".ds", ".bin")
_CHUNK_BYTES = 8 << 20
_VALIDATION_WORDS = {"val", "valid", "validation"}
_PROBED_IDS = 1000  # of the first document, which are decoded and encoded again
_BROKEN_BY_THE_CUT = 8  # the last of them may be encoded in another way, with the text cut behind them


def adopt(
    sources: Sequence[Path],
    out: Path,
    *,
    validation: Sequence[Path] = (),
    tokenizer: str | None = None,
    dtype: TokenDtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Make a dataset of token files and return its manifest.

    Args:
        sources: Token files, or folders of them. In a folder, files with `val`, `valid` or `validation` in their name
            are for validation, those with `test` are left out, and all others are for training.
        out: The folder to make; it must not exist, or be empty.
        validation: Token files, or folders of them, that are all for validation; a folder in `sources` gives them up.
        tokenizer: As for `load_text_tokenizer`; None takes the one that the files name.
        dtype: Type of the ids in a file that does not say; None takes uint16 if the vocabulary fits.
        progress: Called with the bytes that were read and their total.
        say: Called with a line of text before each long part of the work.

    Raises:
        UsageError: `out` is taken, begun or cannot be written, no tokenizer is known, or a path is no token file or is
            named twice.
        DataError: A file does not fit its format, the type of its ids or the vocabulary, or repeats another's tokens.
        ResourceError: The disk is full.
    """
    plan = check_adoption(sources, out, validation=validation, tokenizer=tokenizer, dtype=dtype)
    out = out.resolve()
    try:
        with locked(out, None):
            check_unstarted(out)  # again, now that no other process can begin it
            with unfinished(out) as folder:
                for path in folder.iterdir():  # left by an adoption that was killed
                    path.unlink()
                manifest = _adopt(plan, folder, progress, say)
                commit(folder, out)
    except OSError as error:
        raise disk_error(out, error) from error
    return manifest


class Adoption(NamedTuple):
    """What is adopted, and with which tokenizer."""

    files: list[tuple[Split, str, TokenFile]]
    """Split, name of the format and file, in the order of the shards."""
    tokenizer: Tokenizer
    dtype: TokenDtype
    names: str
    """The names that were given, for the manifest."""


def check_adoption(
    sources: Sequence[Path],
    out: Path,
    *,
    validation: Sequence[Path] = (),
    tokenizer: str | None = None,
    dtype: TokenDtype | None = None,
) -> Adoption:
    """Raise the errors that `adopt` can foresee without reading all tokens, and write nothing; returns the plan.

    Raises:
        UsageError, DataError: See `adopt`.
    """
    check_place(out)
    check_free(out)
    check_unstarted(out)
    held_out = _all(validation)
    elsewhere = {path.resolve() for path in held_out}
    found: list[tuple[Path, Split]] = [one for path in sources for one in _find(path, elsewhere)]
    found += [(path, "validation") for path in held_out]
    _refuse_repeats([path for path, _ in found])
    files = sorted(((split, *_read(path)) for path, split in found), key=lambda one: one[0])
    if not any(split == "train" for split, *_ in files):
        raise UsageError(
            ", ".join(map(str, sources)), expected="token files for training", found="none", remedy="name some"
        )
    names = {file.tokenizer for _, _, file in files if file.tokenizer}
    name = tokenizer or (names.pop() if len(names) == 1 else None)
    if name is None:
        raise UsageError(
            "tokenizer",
            expected="one that made the tokens",
            found=f"the files name {' and '.join(sorted(names)) or 'none'}",
            remedy="name it with --tokenizer",
        )
    text_tokenizer = load_text_tokenizer(name)
    build_hf_tokenizer(text_tokenizer)  # the tokenizer of a model trained on these tokens
    fits = TextEncoder(text_tokenizer).vocab_size <= np.iinfo(np.uint16).max + 1
    by_vocabulary: TokenDtype = "uint16" if fits else "uint32"
    dtypes = {file.dtype or dtype or by_vocabulary for *_, file in files}
    if len(dtypes) > 1:
        raise UsageError(
            "token files",
            expected="ids of one type",
            found=" and ".join(sorted(dtypes)),
            remedy="adopt them one by one, or set --dtype",
        )
    for *_, file in files:
        _check_size(file, dtypes.copy().pop())
    return Adoption(files, text_tokenizer, dtypes.pop(), ", ".join(path.name for path in (*sources, *validation)))


def _find(path: Path, elsewhere: set[Path]) -> list[tuple[Path, Split]]:
    """Return the token files of a path with their splits; of a folder without those that stand elsewhere."""
    if not path.is_dir():
        return [(path, "train")]
    found: list[tuple[Path, Split]] = []
    for file in _all([path]):
        if file.resolve() in elsewhere:
            continue
        words = set(re.split(r"[^a-z]+", file.name.lower()))
        if "test" in words:
            warnings.warn(f"left out of {path}: {file.name}, a test set by its name", stacklevel=2)
        else:
            found.append((file, "validation" if words & _VALIDATION_WORDS else "train"))
    return found


def _refuse_repeats(paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise UsageError(
                str(path), expected="each token file once", found=f"the same file as {other}", remedy="name it once"
            )


def _all(paths: Sequence[Path]) -> list[Path]:
    """Return the token files of paths in the order of their names."""
    found: list[Path] = []
    for path in paths:
        inside = [one for one in path.rglob("*") if one.suffix in _SUFFIXES and not one.name.startswith(".")]
        if path.is_dir() and not inside:
            raise _no_token_file(path, "a folder without such a file")
        found += sorted(inside) if path.is_dir() else [path]
    return found


def _read(path: Path) -> tuple[str, TokenFile]:
    if not path.is_file():
        raise _no_token_file(path, "no such file" if not path.exists() else "another kind of file")
    try:
        for name, read in READERS.items():
            if file := read(path):
                return name, file
    except OSError as error:
        raise DataError(
            str(path), expected="a readable file", found=error.strerror or str(error), remedy="check its permissions"
        ) from error
    raise _no_token_file(path, f"suffix {path.suffix!r}")


def _no_token_file(path: Path, found: str) -> UsageError:
    return UsageError(
        str(path),
        expected=f"a token file ({' or '.join(_SUFFIXES)}) of {', '.join(READERS)}",
        found=found,
        remedy="check the spelling, or make tokens of text with `metatokens prepare`",
    )


def _check_size(file: TokenFile, dtype: TokenDtype) -> None:
    size, item = file.path.stat().st_size - file.offset, np.dtype(dtype).itemsize
    if size <= 0 or size % item:
        raise DataError(
            str(file.path),
            expected=f"ids of {item} bytes ({dtype})",
            found=f"{size} bytes",
            remedy="set --dtype to the type that it was written with",
        )


def _adopt(
    plan: Adoption, folder: Path, progress: Callable[[int, int], None] | None, say: Callable[[str], None]
) -> Manifest:
    encoder = TextEncoder(plan.tokenizer)
    total, done = sum(file.path.stat().st_size for *_, file in plan.files), 0
    shards: list[ShardEntry] = []
    sources: list[SourceFile] = []
    for split, _, file in plan.files:
        shard = folder / f"{split}-{sum(entry.split == split for entry in shards):05d}.ds"
        if not _place(file, shard):
            say(f"copied {file.path}, which could not be linked")
        scan = _scan(shard, file, plan.dtype, encoder, lambda num: progress and progress(done + num, total))  # noqa: B023
        done += file.path.stat().st_size
        _refuse_copy(scan.sha256, file.path, plan, shards)
        _probe(shard, file.path, plan, scan.ends)
        index = scan.ends.astype("<u8").tobytes()
        write_durably(shard.with_name(shard.name + INDEX_SUFFIX), index)
        shards.append(
            ShardEntry(
                name=shard.name,
                split=split,
                bytes=shard.stat().st_size,
                sha256=scan.sha256,
                index_sha256=hashlib.sha256(index).hexdigest(),
                num_tokens=int(scan.ends[-1]),
                num_documents=len(scan.ends),
                first_document=sum(entry.num_documents for entry in shards if entry.split == split),
                min_id=scan.min_id,
                max_id=scan.max_id,
            )
        )
        sources.append(SourceFile(name=file.path.name, bytes=shard.stat().st_size, sha256=scan.sha256))
    write_durably(folder / TOKENIZER_NAME, plan.tokenizer.to_str().encode())
    manifest = Manifest(
        dtype=plan.dtype,
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        eos_token_id=encoder.eos_token_id,
        validation_fraction=0,
        split_rule="by file",
        source=plan.names,
        source_files=tuple(sources),
        options={"adopted_from": ", ".join(sorted({name for _, name, _ in plan.files}))},
        tools=tool_versions(),
        shards=tuple(shards),
        content_id=compute_content_id(
            plan.dtype, encoder.sha256, encoder.vocab_size, encoder.eos_token_id, tuple(shards)
        ),
    )
    write_durably(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _refuse_copy(sha256: str, path: Path, plan: Adoption, shards: Sequence[ShardEntry]) -> None:
    """Refuse the tokens of an earlier file, which may be of the other split."""
    for (*_, file), entry in zip(plan.files, shards, strict=False):
        if entry.sha256 == sha256:
            raise DataError(
                str(path), expected="each text once", found=f"the tokens of {file.path} again", remedy="leave one out"
            )


def _place(file: TokenFile, shard: Path) -> bool:
    """Put the tokens of a file into the new folder; tells whether without a copy."""
    source = file.path.resolve()
    is_link = not file.offset
    if is_link:
        try:
            os.link(source, shard)
        except OSError:  # another disk, or one without hard links; a full disk fails again below
            is_link = False
    if not is_link:
        with source.open("rb") as read, shard.open("xb") as written:
            read.seek(file.offset)
            shutil.copyfileobj(read, written, _CHUNK_BYTES)
    flush_path(shard)  # a link too: the other package may not have flushed the file
    return is_link


class _Scan(NamedTuple):
    """What one pass over a shard found."""

    sha256: str
    min_id: int
    max_id: int
    ends: npt.NDArray[np.uint64]
    """(documents,) in tokens; a last document may lack its end of text."""


def _scan(
    shard: Path, file: TokenFile, dtype: TokenDtype, encoder: TextEncoder, progress: Callable[[int], object]
) -> _Scan:
    """Read a shard once.

    Raises:
        DataError: An id is beyond the vocabulary, or the ids are of another type.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    sha256, ends, at, low, high = hashlib.sha256(), [], 0, encoder.vocab_size, 0
    without_end = 0
    with shard.open("rb") as opened:
        while content := opened.read(_CHUNK_BYTES):
            sha256.update(content)
            ids = np.frombuffer(content, kind)
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            if high >= encoder.vocab_size or (not at and file.dtype is None and _looks_wider(ids)):
                raise _no_ids(file, dtype, encoder, at, ids)
            if file.ends is None:
                ends.append(np.flatnonzero(ids == encoder.eos_token_id) + (at + 1))
            else:
                here = file.ends[
                    np.searchsorted(file.ends, at, "right") : np.searchsorted(file.ends, at + len(ids), "right")
                ]
                without_end += int((ids[here.astype(np.int64) - (at + 1)] != encoder.eos_token_id).sum())
            at += len(ids)
            progress(at * kind.itemsize)
    found = np.concatenate(ends) if file.ends is None else file.ends
    if not len(found) or found[-1] != at:
        found = np.append(found, at)
    if without_end:
        warnings.warn(
            f"{file.path}: {without_end} of {len(found)} documents do not end with the end of text "
            f"({encoder.eos_token_id}), so a model will read on from one into the next",
            stacklevel=2,
        )
    return _Scan(sha256.hexdigest(), low, high, found.astype(np.uint64))


def _looks_wider(ids: npt.NDArray[np.integer]) -> bool:
    """Tell whether uint16 ids are the halves of uint32 ones: every second is 0, as their upper halves are."""
    return ids.itemsize == 2 and len(ids) % 2 == 0 and len(ids) >= 16 and not ids[1::2].any() and bool(ids[::2].any())


def _no_ids(
    file: TokenFile, dtype: TokenDtype, encoder: TextEncoder, at: int, ids: npt.NDArray[np.integer]
) -> DataError:
    beyond = np.flatnonzero(ids >= encoder.vocab_size)
    return DataError(
        str(file.path),
        expected=f"{dtype} ids below {encoder.vocab_size}, the size of the vocabulary",
        found=f"id {ids[beyond[0]]} at token {at + int(beyond[0])}"
        if len(beyond)
        else "0 in every second place, as in uint32",
        remedy="name the tokenizer that made the tokens" + ("" if file.dtype else ", or set --dtype"),
    )


def _probe(shard: Path, path: Path, plan: Adoption, ends: npt.NDArray[np.uint64]) -> None:
    """Warn if the tokenizer encodes the text of the first document to other ids."""
    encoder = TextEncoder(plan.tokenizer)
    ids = np.fromfile(shard, np.dtype(plan.dtype).newbyteorder("<"), min(int(ends[0]), _PROBED_IDS)).astype(np.uint32)
    ids = ids[ids != encoder.eos_token_id]
    again = encoder.encode_batch([plan.tokenizer.decode(ids.tolist(), skip_special_tokens=False)])[0]
    certain = max(len(ids) - _BROKEN_BY_THE_CUT, 0)
    if not np.array_equal(again[:certain], ids[:certain]):
        warnings.warn(
            f"{path}: the tokenizer encodes the text of the first document to other ids; did it make the tokens?",
            stacklevel=2,
        )
