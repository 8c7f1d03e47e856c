"""The plan of a scale: its parts, and the commands of each in their order.

    purpose: two CPU cores
    parts:
      - name: E2
        question: does recall survive a longer window?
        folder: e2
        steps:
          - {run: "sweep {files}/e2-trained.yaml --out e2-trained"}
          - each: {factor: [4, 8], seed: [0, 1]}
            run: "extend e2-trained/runs/meta/seed-{seed} --factor {factor} --out x{factor}/seed-{seed}"
            creates: "x{factor}/seed-{seed}"

Commands run in the part's folder, below that of the replication. `{files}` is the folder of the plan, and `each` runs
the command once for each combination of its values. The next scale is one folder beside the others, and its name in
`SCALES`.
"""

import hashlib
import itertools
import shlex
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from metatokens.config.contrasts import Contrasts
from metatokens.config.loading import load_preset, read_file
from metatokens.config.schema import Frozen
from metatokens.config.sweep import load_sweep
from metatokens.errors import DataError, UsageError

PLAN_NAME = "plan.yaml"
FROZEN_NAME = "frozen.sha256"
VERBS = ("sweep", "prepare", "extend", "evaluate")
SCALES = ("tiny", "small", "paper")


class Step(Frozen):
    """A command of the package, for each combination of some values."""

    run: str
    """The verb and its arguments. A word with `*` stands for the paths that match it."""
    each: dict[str, tuple[str | int, ...]] = Field(default_factory=dict)
    """Names in braces, and the values that they take."""
    creates: str | None = None
    """A path that exists once the command has been done; it is then skipped. A sweep skips what is done by itself."""
    writes: str | None = None
    """A file that gets what the command prints as JSON; it is then skipped."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        verb = self.run.split(maxsplit=1)[0]
        if verb not in VERBS:
            raise ValueError(f"run begins with {verb!r}, not with {', '.join(VERBS)}")
        if (verb == "sweep") == bool(self.creates or self.writes):
            raise ValueError(f"run {verb} needs creates or writes, and sweep needs neither")
        if verb in {"sweep", "extend"} and "--out" not in self.run.split():
            raise ValueError(f"run {verb} needs --out")
        return self


class Part(Frozen):
    """An experiment of the replication."""

    name: str
    question: str
    folder: str = "."
    """Below that of the replication; parts may share it."""
    needs_books: bool = False
    """Whether its folder gets train/ and test/, which are the user's."""
    contrasts: str | None = None
    """The file of contrasts that is judged after its steps."""
    steps: tuple[Step, ...] = Field(min_length=1)


class Plan(Frozen):
    """All parts of a scale."""

    purpose: str = ""
    text_vocab_size: int = Field(50_257, ge=1)
    """Of the tokenizer that the text models have, for the estimate of the cost."""
    gpu: str | None = None
    """The kind of GPU that it is planned for; off means CPU cores."""
    seconds_per_step: float = Field(0.02, ge=0)
    """What a step takes beside its operations. This and the next field are rough: E1's parity took 1.5 times the
    processor time that their defaults give it, with evaluations, and with imports, which a sweep makes once now."""
    operations_per_core_second: float = Field(4.5e10, gt=0)
    """Operations of training on one core."""
    parts: tuple[Part, ...] = ()


class Command(NamedTuple):
    """One command, ready to run in the part's folder."""

    words: list[str]
    skipped_if: str | None
    """A path, relative to the part's folder."""
    writes: str | None


class Scale(NamedTuple):
    """A plan and the folder that it lies in."""

    name: str
    folder: Path
    plan: Plan

    def commands(self, part: Part) -> Iterator[Command]:
        """Yield the commands of a part in their order."""
        for step in part.steps:
            for values in itertools.product(*step.each.values()):
                named = {"files": shlex.quote(str(self.folder)), **dict(zip(step.each, map(str, values), strict=True))}
                made, written = (text and _fill(text, named) for text in (step.creates, step.writes))
                yield Command(shlex.split(_fill(step.run, named)), made or written, written)


def load_scale(name: str) -> Scale:
    """Load a scale by its name, or by the path of its folder.

    Raises:
        UsageError: there is no such scale, or its plan or contrasts are not valid.
        DataError: a file that was fixed before the first run has changed.
    """
    folder = Path(str(files("metatokens.replication") / name)) if name in SCALES else Path(name)
    if not (folder / PLAN_NAME).is_file():
        found = f"{name}, which is neither" if not folder.is_dir() else f"{folder} without {PLAN_NAME}"
        remedy = f"choose one of {', '.join(SCALES)}"
        raise UsageError("--scale", expected=f"a scale, or a folder with {PLAN_NAME}", found=found, remedy=remedy)
    _check_frozen(folder)
    plan = load_preset(folder / PLAN_NAME, schema=Plan)
    for part in plan.parts:
        if part.contrasts is not None:
            _check_contrasts(folder, part, part.contrasts)
    return Scale(name, folder.resolve(), plan)


def _check_contrasts(folder: Path, part: Part, contrasts: str) -> None:
    """Check that the contrasts of a part are of arms and evaluations that its sweeps have."""
    named = read_file(folder / contrasts, schema=Contrasts)
    swept = [task for task in named.tasks if any(f"/{task}.yaml" in step.run for step in part.steps)]
    if not swept:
        raise _not_swept(folder / contrasts, f"a sweep of part {part.name}", ", ".join(named.tasks))
    for task in swept:
        sweep = load_sweep(folder / f"{task}.yaml")
        if missing := sorted(named.arms - sweep.axes.get("arm", {}).keys()):
            raise _not_swept(folder / contrasts, f"arms of {task}.yaml", missing[0])
        if named.tasks[task] != len(sweep.seeds):
            raise _not_swept(
                folder / contrasts, f"{len(sweep.seeds)} seeds, as {task}.yaml has", str(named.tasks[task])
            )
        for arm, evaluation in named.sides if named.endpoint != "solve" else ():
            asked = [one for one in sweep.evaluations if one.name == evaluation and arm in one.where.get("arm", (arm,))]
            if not asked:
                raise _not_swept(folder / contrasts, f"an evaluation of {arm} in {task}.yaml", evaluation)
            if unknown := [length for length in named.lengths if length not in asked[0].ask.get("lengths", ())]:
                raise _not_swept(folder / contrasts, f"lengths of {evaluation} in {task}.yaml", unknown[0])


def _not_swept(contrasts: Path, expected: str, found: str) -> UsageError:
    return UsageError(
        str(contrasts), expected=expected, found=found, remedy="correct the file of contrasts, or the sweep"
    )


def _fill(text: str, named: dict[str, str]) -> str:
    """Replace names in braces; other braces, as those of YAML, stay."""
    for name, value in named.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _check_frozen(folder: Path) -> None:
    """Check the files that were fixed before the first run, as `sha256sum --check` does."""
    if not (folder / FROZEN_NAME).is_file():
        return
    for line in (folder / FROZEN_NAME).read_text(encoding="utf-8").splitlines():
        expected, name = line.split()
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise DataError(
                str(folder / name),
                expected="the file that was fixed before the first run",
                found="another content",
                remedy="restore it, or copy the folder without frozen.sha256 to ask something else",
            )
