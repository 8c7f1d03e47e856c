"""Files that go bad: each is refused in one line with the exit code of its kind, or nothing of its content is lost."""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import harms
from campaign import Case, fault
from subjects import SUBJECTS, Subject

from commands import metatokens
from metatokens.errors import MetaTokensError


def original(case: Case, name: str, variant: int = 0) -> Path:
    """Return a folder of a kind that is whole; it is made once."""
    folder = case.shared / "subjects" / f"{name}-{variant}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        SUBJECTS[name].make(case, folder, variant)
    return folder


@cache
def content_of(name: str, folder: Path, shared: Path) -> Any:
    """Read a copy, because some reading leaves files."""
    with tempfile.TemporaryDirectory(prefix="fault-") as place:
        copy = Path(shutil.copytree(folder, Path(place) / "harmed"))
        return SUBJECTS[name].read(Case(Random(0), Path(place), shared), copy)


def harm_one_file(case: Case, harm: harms.Harm) -> int:
    """Harm a file of a random kind and read its folder; return whether the file could be harmed in this way."""
    name = case.random.choice(sorted(SUBJECTS))
    subject, whole, other = SUBJECTS[name], original(case, name), original(case, name, 1)
    expected = content_of(name, whole, case.shared)
    folder = Path(shutil.copytree(whole, case.folder / "harmed"))
    file = case.random.choice(
        [path for path in sorted(folder.rglob("*")) if path.is_file() and not any(map(path.match, subject.spares))]
    )
    where = file.relative_to(folder)
    if not harm(case.random, file, other / where if subject.is_closed else None):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = refusal_of(lambda: subject.read(case, folder), expected, f"{harm.__name__} of {name}/{where}")
        case.tally[f"{name}, {'with the same content' if refusal is None else f'exit code {refusal.exit_code}'}"] += 1
        if refusal is not None:
            check_refusal(case, subject, refusal, folder, f"{harm.__name__} of {name}/{where}")
    return 1


def refusal_of(read: Callable[[], Any], expected: Any, what: str) -> MetaTokensError | None:
    try:
        found = read()
    except MetaTokensError as error:
        return error
    except Exception as error:  # any error that is not ours is a finding, and names its type
        raise AssertionError(f"{what} ended in {type(error).__name__}: {error}") from error
    assert found == expected, f"{what} was accepted in silence"
    return None


def check_refusal(case: Case, subject: Subject, refusal: MetaTokensError, folder: Path, what: str) -> None:
    line = str(refusal)
    assert refusal.exit_code in subject.codes, f"{what} ended with exit code {refusal.exit_code}: {line}"
    assert len(line.splitlines()) == 1, f"{what} ended in several lines: {line}"
    assert folder.name in line, f"{what} does not name a file: {line}"
    if subject.command and case.random.random() < 0.25:
        folder.with_name(f"{folder.name}.txt").write_text("the cat sat on the mat. " * 20)
        words = [word.format(folder) for word in subject.command]
        shown = metatokens(*words, code=refusal.exit_code).stderr
        lines = [text for text in shown.splitlines() if text and "warning" not in text]
        assert len(lines) == 1 or words[0] == "verify", f"{what}: `metatokens {words[0]}` said {shown}"


@fault(counts="files with bytes flipped", times=20)
def flip_bytes(case: Case) -> int:
    return harm_one_file(case, harms.flip)


@fault(counts="files truncated", times=10)
def truncate_files(case: Case) -> int:
    return harm_one_file(case, harms.truncate)


@fault(counts="files emptied or zeroed", times=5)
def empty_files(case: Case) -> int:
    return harm_one_file(case, harms.empty)


@fault(counts="files swapped", times=10)
def swap_files(case: Case) -> int:
    return harm_one_file(case, harms.swap)


@fault(counts="files grown", times=5)
def grow_files(case: Case) -> int:
    return harm_one_file(case, harms.grow)


@fault(counts="files lost", times=5)
def lose_files(case: Case) -> int:
    return harm_one_file(case, harms.lose)
