"""What an analysis leaves behind: `results.json`, one record a number, and `arrays.npz` for what is too large for it.

A report renders these and computes nothing. The same analysis gives the same bytes: keys are sorted, no date is
written, and the archive's members have one fixed time.

The measures are defined where they are taken; `docs/guide/analysis.md` has the table of all. Layers count from 0; of
states 0 is before the first block and L after the last.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from metatokens.config.base import Frozen
from metatokens.errors import DataError
from metatokens.storage import file_sha256, no_follow, read_sealed, write_sealed

SCHEMA_VERSION = 4
RESULTS_NAME = "results.json"
ARRAYS_NAME = "arrays.npz"
_ARRAYS_DIGEST = "arrays_sha256"
_LARGEST_ARRAYS = 1 << 32  # bytes, unpacked
_WRITE_ANEW = "write it anew with metatokens analyze"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

Arrays = Mapping[str, npt.NDArray[Any]]


class Record(Frozen):
    """One measured number."""

    measure: str
    """Its name in `metatokens.analysis.measures.MEASURES`."""
    unit: str
    at: dict[str, str | int | float] = Field(default_factory=dict)
    """What it belongs to, by axis; an axis that is left out is averaged over."""
    value: float | None
    """None where it cannot be computed; `note` says why."""
    low: float | None = None
    high: float | None = None
    num_documents: int = Field(ge=0)
    p_value: float | None = None
    adjusted_p: float | None = None
    """Corrected for all records of the same measure that have coordinates (Benjamini-Hochberg)."""
    note: str | None = None


VerdictName = Literal["supported", "the opposite holds", "inconclusive", "too few documents", "not tested"]
VERDICTS: tuple[VerdictName, ...] = get_args(VerdictName)


class Verdict(Frozen):
    """One claim of the paper, and what came of it here."""

    claim: str
    paper: str
    """The paper's own number, as text."""
    endpoint: str
    """Which number decides, and how; fixed before the run."""
    verdict: VerdictName
    """Not tested: nothing was measured."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    num_documents: int = 0
    p_value: float | None = None
    """Adjusted over all verdicts (Holm)."""
    share_of_paper: float | None = None
    """`value` over the paper's own number, where it has one for the same quantity."""
    note: str | None = None

    @property
    def beside_paper(self) -> str:
        """The effect as a share of the paper's, in words; empty where the paper has no number for it."""
        return "" if self.share_of_paper is None else f"{100 * self.share_of_paper:.0f}% of the paper's"


class TokenView(Frozen):
    """One text, token by token."""

    title: str
    tokens: tuple[str, ...]
    is_meta: tuple[bool, ...]
    arrays: dict[str, str]
    """Maps the name of each array, as `token_view` lists them, to its key in arrays.npz."""


class Results(Frozen):
    """All that a report needs."""

    schema_version: Literal[4] = 4
    title: str
    checkpoint: dict[str, Any]
    config: dict[str, Any]
    config_sha256: str
    endpoints_sha256: str
    """Of the primary endpoints alone, so that it can be seen that they were not changed after the fact."""
    data: dict[str, Any]
    seed: int
    versions: dict[str, str]
    command: str
    not_run: tuple[str, ...] = ()
    records: tuple[Record, ...]
    verdicts: tuple[Verdict, ...] = ()
    token_views: tuple[TokenView, ...] = ()

    def find(self, measure: str, **at: str | float) -> list[Record]:
        """Return the records of a measure whose coordinates include the given ones."""
        return [
            record
            for record in self.records
            if record.measure == measure and all(record.at.get(key) == value for key, value in at.items())
        ]


def write_results(folder: Path, results: Results, arrays: Arrays) -> None:
    """Write both files; the archive first, because results.json, which is sealed, holds its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ARRAYS_NAME, "wb", opener=no_follow) as file:
        write_archive(file, arrays)
    document = {_ARRAYS_DIGEST: file_sha256(folder / ARRAYS_NAME), **results.model_dump(mode="json")}
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False)
    write_sealed(folder / RESULTS_NAME, f"{text}\n")


def read_results(folder: Path) -> tuple[Results, dict[str, npt.NDArray[Any]]]:
    """Return what `write_results` wrote.

    Results that never had a digest of their arrays, such as those kept in a repository, may stand alone; a line of
    `not_run` then says what is missing.

    Raises:
        DataError: files that are missing, broken, altered or of another version.
    """
    results, digest = read_results_file(folder / RESULTS_NAME)
    path = folder / ARRAYS_NAME
    if digest is None and not path.exists():
        line = f"token view, documents behind heat maps, points of the theorem: {ARRAYS_NAME} is not here"
        return results.model_copy(update={"token_views": (), "not_run": (*results.not_run, line)}), {}
    try:
        arrays = read_archive(path)
        if digest is not None and (found := file_sha256(path)) != digest:
            raise ValueError(f"the SHA-256 {found} in place of {digest}")
        if "theory_points" in arrays and arrays["theory_points"].shape[1:] != (4,):
            raise ValueError(f"theory_points of shape {arrays['theory_points'].shape}")
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            str(path), expected="the arrays of the results", found=_cause(error), remedy=_WRITE_ANEW
        ) from error
    missing = sorted({key for view in results.token_views for key in view.arrays.values()} - arrays.keys())
    if missing:
        raise DataError(str(path), expected=f"an array {missing[0]}", found="none of that name", remedy=_WRITE_ANEW)
    return results, arrays


def read_results_file(path: Path) -> tuple[Results, str | None]:
    """Return what a results.json holds, and the SHA-256 of its arrays; None in a file that is not sealed.

    Raises:
        DataError: see `read_results`.
    """
    try:
        document = json.loads(read_sealed(path, remedy=_WRITE_ANEW))
    except (ValueError, RecursionError) as error:
        raise DataError(
            str(path), expected="results of metatokens analyze", found=_cause(error), remedy=_WRITE_ANEW
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(str(path), expected=f"schema_version {SCHEMA_VERSION}", found=repr(version), remedy=_WRITE_ANEW)
    digest = document.pop(_ARRAYS_DIGEST, None)
    try:
        return Results.model_validate(document), digest
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(str(path), expected="the declared schema", found=found, remedy=_WRITE_ANEW) from error


def write_archive(file: IO[bytes], arrays: Arrays) -> None:
    """Write arrays as a .npz; equal arrays give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(arrays[name]), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data.getvalue())


def read_archive(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an archive; one that would unpack to more than the largest size is a ValueError."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        for member in archive.infolist():
            with archive.open(member) as content:  # numpy makes room for what the member's own header states
                if _stated_bytes(content) > member.file_size:
                    raise ValueError(f"{member.filename} is shorter than its header states")
    if unpacked > _LARGEST_ARRAYS:
        raise ValueError(f"more than {_LARGEST_ARRAYS} bytes, unpacked")
    with np.load(path, allow_pickle=False) as loaded:
        return dict(loaded)


def _stated_bytes(content: IO[bytes]) -> int:
    """Return the bytes of the array that the header of a .npy file describes."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(content)
    if version not in read_header:
        raise ValueError(f"a .npy of version {version}")
    shape, _, dtype = read_header[version](content)
    return math.prod(shape) * dtype.itemsize


def _cause(error: Exception) -> str:
    """Say what went wrong, of a path without its number and name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
