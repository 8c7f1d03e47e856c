"""Verification: it compares every file of a folder that this package wrote with its digest, whatever the folder holds.

A kind of folder is one function under `@kind`, which yields the checks of its parts; a part that fails does not keep
the others from being checked. A folder of no kind is searched for folders that have one. Nothing is written, and no
tensor is loaded.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metatokens.errors import CheckpointError, DataError, MetaTokensError, UsageError
from metatokens.storage import is_sealed, read_sealed

Check = Callable[[], int]
"""Raises a MetaTokensError, or returns how many files it has compared with a digest."""
Checks = Iterator[Check]
_ANOTHER_COPY = "take another copy"
_LARGEST_PEEK = 1 << 28


@dataclass(frozen=True)
class Verified:
    """What came of a verification."""

    folder: str
    kind: str
    files: int
    """Files that equal their digest."""
    problems: tuple[MetaTokensError, ...]
    not_sealed: tuple[str, ...]
    """Files that older versions or others wrote, without a digest."""


_KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, list[str]], Checks]]] = {}


def kind(
    recognise: Callable[[Path], bool],
) -> Callable[[Callable[[Path, list[str]], Checks]], Callable[[Path, list[str]], Checks]]:
    """Make a function the checks of a kind of folder, which has the function's name.

    The function takes the folder and a list, to which it adds the names of files without a digest.
    """

    def add(function: Callable[[Path, list[str]], Checks]) -> Callable[[Path, list[str]], Checks]:
        _KINDS[function.__name__] = recognise, function
        return function

    return add


def check_folder_exists(folder: Path) -> None:
    """Raise UsageError unless there is such a folder."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "none"
        raise UsageError(str(folder), expected="a folder", found=found, remedy="check the path")


def verify_folder(folder: Path) -> Verified:
    """Compare every file of a folder with its digest.

    Raises:
        UsageError: there is no such folder, or nothing of this package in it.
    """
    check_folder_exists(folder)
    name, checks = next(_find(folder), (None, None))
    not_sealed: list[str] = []
    if name is not None and checks is not None:
        parts = checks(folder, not_sealed)
    else:
        name, parts = "folders", _inside(folder, not_sealed)
    files, problems, number = 0, [], 0
    for number, part in enumerate(parts, start=1):  # noqa: B007 - tells below whether there was any
        try:
            files += part()
        except MetaTokensError as error:
            problems.append(error)
        except OSError as error:
            found = error.strerror or str(error)
            where = str(error.filename or folder)
            problems.append(DataError(where, expected="a readable file", found=found, remedy=_ANOTHER_COPY))
    if not number:
        raise UsageError(
            str(folder),
            expected="a run, checkpoint, model, tokens, analysis or sweep",
            found="none of their files",
            remedy="check the path",
        )
    return Verified(str(folder), name, files, tuple(problems), tuple(not_sealed))


def _find(folder: Path) -> Iterator[tuple[str, Callable[[Path, list[str]], Checks]]]:
    for name, (recognise, checks) in _KINDS.items():
        with suppress(OSError):
            if recognise(folder):
                yield name, checks


def _inside(folder: Path, not_sealed: list[str]) -> Checks:
    """Yield the checks of the folders inside that have a kind; links are not followed."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        folders = [path for path in paths if path.is_dir() and not path.is_symlink()]
    except OSError as error:
        yield _unreadable(folder, error)
        return
    for path in folders:
        _, checks = next(_find(path), (None, None))
        yield from (checks or _inside)(path, not_sealed)


def _unreadable(folder: Path, error: OSError) -> Check:
    found = error.strerror or str(error)
    problem = DataError(str(folder), expected="a readable folder", found=found, remedy=_ANOTHER_COPY)

    def check() -> int:
        raise problem

    return check


# Kinds, the surest marks first ---------------------------------------------------------------------------------


@kind(lambda folder: (folder / "config.yaml").exists() or (folder / "checkpoints").is_dir())
def run(folder: Path, not_sealed: list[str]) -> Checks:
    """Check config and result of a run, its checkpoints, its model, and what a sweep measured of it."""
    from metatokens.config.finetuning import FinetuneConfig
    from metatokens.config.grafting import GraftRunConfig
    from metatokens.config.loading import verb_of
    from metatokens.config.schema import PretrainConfig
    from metatokens.training.result import read_result
    from metatokens.training.run_folder import RunFolder

    schemas: dict[str, Any] = {"finetune": FinetuneConfig, "graft": GraftRunConfig}

    def read_config(path: Path) -> Any:
        return paths.stored(schemas.get(verb_of(str(path)), PretrainConfig))

    paths = RunFolder(folder)
    if paths.config_path.exists():
        yield _sealed(paths.config_path, read_config, not_sealed)
    if paths.result_path.exists():
        yield _sealed(paths.result_path, lambda _: read_result(paths), not_sealed)
    for name in ("preset.yaml", "evaluation.json", "cpu_seconds.json"):
        if (folder / name).exists():
            yield _sealed(folder / name, _read, not_sealed)
    if paths.model_path.is_dir():
        yield lambda: _check_model(paths.model_path)
    for path in (*sorted(paths.checkpoints_path.glob("step-*")), paths.diagnostic_path):
        if path.is_dir():
            yield from checkpoint(path, not_sealed)


@kind(lambda folder: (folder / "state.json").exists())
def checkpoint(folder: Path, not_sealed: list[str]) -> Checks:
    """Check a checkpoint of a run, from which it could continue."""
    from metatokens.training.checkpoint import read_state, verify_checkpoint
    from metatokens.training.untrusted import check_files

    del not_sealed

    def check() -> int:
        files = len(verify_checkpoint(folder))
        check_files(folder)
        read_state(folder)
        return files

    yield check


@kind(lambda folder: _peek(folder / "manifest.json").get("format") == "tokens" or any(folder.glob("*.ds")))
def tokens(folder: Path, not_sealed: list[str]) -> Checks:
    """Check shards, their indices and the tokenizer."""
    from metatokens.data.shards import TokenDataset

    del not_sealed

    def check() -> int:
        with TokenDataset.open(folder) as dataset:
            return 1 + 2 * len(dataset.manifest.shards)

    yield check


@kind(lambda folder: (folder / "config.json").exists() or (folder / "manifest.json").exists())
def model(folder: Path, not_sealed: list[str]) -> Checks:
    """Check the folder of a model; one of others has no digests."""

    def check() -> int:
        files = _check_model(folder, may_lack_manifest=True)
        if not files:
            not_sealed.append(str(folder))
        return files

    yield check


@kind(lambda folder: (folder / "arrays.npz").exists() or "schema_version" in _peek(folder / "results.json"))
def analysis(folder: Path, not_sealed: list[str]) -> Checks:
    """Check the results of an analysis and their arrays."""
    from metatokens.analysis.results import RESULTS_NAME, read_results

    def check() -> int:
        read_results(folder)
        if not is_sealed(folder / RESULTS_NAME):
            not_sealed.append(str(folder / RESULTS_NAME))
            return 0
        return 2

    yield check


@kind(lambda folder: (folder / "results.json").exists())
def sweep(folder: Path, not_sealed: list[str]) -> Checks:
    """Check the results of a sweep and every run below it."""
    from metatokens.report.sweep_results import load_results

    yield _sealed(folder / "results.json", load_results, not_sealed)
    yield from _inside(folder, not_sealed)


def _check_model(folder: Path, *, may_lack_manifest: bool = False) -> int:
    from metatokens.training.checkpoint import MANIFEST, verify_model
    from metatokens.training.untrusted import check_files

    digests = verify_model(folder)
    if not digests and not may_lack_manifest:
        name = str(folder / MANIFEST)
        raise CheckpointError(name, expected="the manifest of a run's model", found="none", remedy=_ANOTHER_COPY)
    check_files(folder)
    return len(digests)


def _sealed(path: Path, read: Callable[[Path], Any], not_sealed: list[str]) -> Check:
    """Return the check of a sealed file that `read` reads whole."""

    def check() -> int:
        read(path)
        if is_sealed(path):
            return 1
        not_sealed.append(str(path))
        return 0

    return check


def _read(path: Path) -> None:
    """Read a sealed JSON or YAML file whole; one that was cut off within its seal holds nothing."""
    text = read_sealed(path, remedy=_ANOTHER_COPY)
    with suppress(ValueError, RecursionError, yaml.YAMLError):
        if (json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)) is not None:
            return
    raise DataError(str(path), expected=f"{path.suffix[1:].upper()} with content", found="none", remedy=_ANOTHER_COPY)


def _peek(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, to tell the kind of its folder; an empty one if it cannot be read."""
    try:
        if path.stat().st_size > _LARGEST_PEEK:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
