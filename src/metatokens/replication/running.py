"""Run the parts of a replication, command after command; the same call goes on after any end."""

import contextlib
import io
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from metatokens.errors import DataError, UsageError
from metatokens.evaluation.recall import RecallReport
from metatokens.replication.contrasts import write_contrasts, write_summary
from metatokens.replication.plan import Command, Part, Scale
from metatokens.report.tables import asked_to_markdown
from metatokens.storage import make_folder, write_atomically

TEXTS = ("train", "test")
SOME_TRAININGS_FAILED = 1


def choose_parts(scale: Scale, names: Sequence[str]) -> list[Part]:
    """Return the parts of these names, in the order of the plan; all parts if there are no names.

    Raises:
        UsageError: a part does not exist.
    """
    known = {part.name: part for part in scale.plan.parts}
    if unknown := [name for name in names if name not in known]:
        raise UsageError("--part", expected=f"some of {', '.join(known)}", found=unknown[0], remedy="correct the name")
    return [part for part in scale.plan.parts if not names or part.name in names]


def check_books(parts: Sequence[Part], out: Path, books: Path | None) -> None:
    """Check that parts that need books have them.

    Raises:
        UsageError: there is no folder, or it lacks train/ or test/.
    """
    for part in parts:
        if part.needs_books and not all((out / part.folder / name).is_dir() for name in TEXTS):
            missing = books is None or not all((books / name).is_dir() for name in TEXTS)
            if missing:
                raise UsageError(
                    "--books",
                    expected=f"a folder with train/ and test/, texts that part {part.name} needs",
                    found="none" if books is None else str(books),
                    remedy="give the folder, or choose other parts with --part",
                )


def run_part(
    scale: Scale,
    part: Part,
    out: Path,
    *,
    slots: Sequence[str],
    books: Path | None,
    command: Callable[[list[str]], int],
    say: Callable[[str], None],
) -> int:
    """Run what is left of a part and return the exit code of its last command.

    Args:
        scale: of the plan.
        part: of the scale.
        out: folder of the replication.
        slots: options that every sweep gets, such as --jobs 2.
        books: a folder with train/ and test/.
        command: runs a command of the package and returns its exit code.
        say: tells what runs.
    """
    folder = out / part.folder
    make_folder(folder)
    if part.needs_books and books is not None:
        _link_books(folder, books.resolve())
    failed = 0
    with contextlib.chdir(folder):
        for one in scale.commands(part):
            if one.skipped_if is not None and Path(one.skipped_if).exists():
                continue
            words = [*_with_paths(one.words), *((*slots, "--figures") if one.words[0] == "sweep" else ())]
            say(f"{part.name}: {shlex.join(words)}")
            code = _run(one, words, command)
            if code == SOME_TRAININGS_FAILED and one.words[0] == "sweep":
                failed = code  # must not keep the others from running
            elif code:
                return code
    return failed


def write_tables(scale: Scale, out: Path) -> Path:
    """Judge the contrasts and write replication.md, the tables of all parts so far; return its path.

    explanations.md and explanations.png have the contrasts of the explanations side by side.
    """
    lines = [f"# Replication, scale {scale.name}", ""]
    all_judged: list[Path] = []
    for part in scale.plan.parts:
        lines += [f"# {part.name}: {part.question}", ""]
        judged: Path | None = None
        if part.contrasts is not None:
            try:
                judged = write_contrasts(scale.folder, part.contrasts, out / part.folder, name=part.name.lower())
            except DataError as error:  # must not keep other parts from running
                lines += [f"Its contrasts were not judged: {error}", ""]
        tables = list(_tables(scale, part, out, judged))
        lines += tables or ["Nothing has been measured yet.", ""]
        if judged is not None:
            all_judged.append(judged)
    write_summary(all_judged, out)
    path = out / "replication.md"
    write_atomically(path, "\n".join(lines))
    return path


def _tables(scale: Scale, part: Part, out: Path, judged: Path | None) -> Iterator[str]:
    if judged is not None:
        yield judged.with_suffix(".md").read_text(encoding="utf-8")
    for words, _, _ in scale.commands(part):
        if words[0] == "sweep":
            table = out / part.folder / words[words.index("--out") + 1] / "table.md"
            if table.is_file():
                yield table.read_text(encoding="utf-8")
    if asked := _asked(scale, part, out):
        yield f"# Asked without a training\n\n{asked_to_markdown(asked)}"


def _asked(scale: Scale, part: Part, out: Path) -> dict[str, RecallReport]:
    """Return what the evaluations of a part have found so far, by the names of their files."""
    names = (one.writes for one in scale.commands(part) if one.words[0] == "evaluate" and one.writes)
    files = (out / part.folder / name for name in names)
    read = TypeAdapter(RecallReport).validate_json
    return {file.stem: read(file.read_bytes()) for file in files if file.is_file()}


def _link_books(folder: Path, books: Path) -> None:
    for name in TEXTS:
        if not (folder / name).exists():
            (folder / name).symlink_to(books / name)


def _with_paths(words: Sequence[str]) -> list[str]:
    """Replace each word with `*` by the paths that match it."""
    return [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


def _run(one: Command, words: list[str], command: Callable[[list[str]], int]) -> int:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = command([*words, "--json"])
    if not code and one.writes is not None:
        write_atomically(Path(one.writes), printed.getvalue())
    return code
