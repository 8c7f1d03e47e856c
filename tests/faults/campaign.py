"""A campaign of faults against real runs; `make test-faults`, or for longer ones

    nice -n 19 .venv/bin/python tests/faults/campaign.py --rounds 20 --seed 1 --out campaign.json

Each fault is a function with `@fault(...)`: it does one piece of work on a run of its own, harms it, and returns how
often; it fails by an assertion if a result differs or something was lost. A new kind is one function, in a file that
`MODULES` names. Everything that a fault draws comes from `case.random`, so the seed that a failure prints repeats it.

A round does every kind under one seed. The JSON is written after each round, and the same command goes on behind the
rounds that it holds.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
MODULES = ("kills", "corruptions", "texts")


@dataclass
class Case:
    """One piece of work of a fault."""

    random: random.Random
    folder: Path
    """An empty folder of its own."""
    shared: Path
    """A folder of the whole campaign, for what is made once, such as runs to compare with."""
    tally: Counter[str] = field(default_factory=Counter)
    """What the fault wants to be counted besides, such as how many kills were of which kind of run."""


Fault = Callable[[Case], int]


@dataclass(frozen=True)
class Kind:
    """A fault, and how often a campaign does it."""

    act: Fault
    counts: str
    """What the number that it returns counts, such as "kills survived"."""
    times: int
    """How many in a round; `--times` multiplies it."""


KINDS: dict[str, Kind] = {}


def fault(*, counts: str, times: int) -> Callable[[Fault], Fault]:
    """Make a function a fault of the campaign, under its own name."""

    def register(act: Fault) -> Fault:
        KINDS[act.__name__] = Kind(act, counts, times)
        return act

    return register


@dataclass
class Outcome:
    """What became of one kind of fault."""

    counts: str
    done: int = 0
    cases: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    tally: dict[str, int] = field(default_factory=dict)
    revisions: list[str] = field(default_factory=list)
    """Of the package that was harmed, each once, in the order of the rounds."""

    def add(self, other: "Outcome") -> None:
        """Count another round in."""
        self.done += other.done
        self.cases += other.cases
        self.seconds = round(self.seconds + other.seconds, 1)
        self.failures += other.failures
        self.tally = dict(sorted((Counter(self.tally) + Counter(other.tally)).items()))
        self.revisions = list(dict.fromkeys(self.revisions + other.revisions))


def run_kind(name: str, kind: Kind, times: int, seed: int, shared: Path) -> Outcome:
    """Do one kind of fault until it was done so often."""
    outcome, began = Outcome(kind.counts, revisions=[revision()]), time.monotonic()
    # a fault that fails every time must end too
    while outcome.done < times and len(outcome.failures) < 1 + times // 10:
        own_seed = f"{seed}/{name}/{outcome.cases}"
        with tempfile.TemporaryDirectory(prefix="fault-") as folder:
            case = Case(random.Random(own_seed), Path(folder), shared)
            try:
                outcome.done += kind.act(case)
            except Exception as error:  # noqa: BLE001 - whatever went wrong is the result
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome.failures.append(f"seed {own_seed}: {type(error).__name__}: {error} ({where.name})")
                outcome.failures[-1] += "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        outcome.add(Outcome(kind.counts, cases=1, tally=case.tally))
    outcome.seconds = round(time.monotonic() - began, 1)
    say(f"seed {seed}: {name:28} {outcome.done:5} {kind.counts} in {outcome.seconds} s, {len(outcome.failures)} failed")
    return outcome


def revision() -> str:
    """Return the version of the package and the commit it is of, with `-dirty` behind it if files were changed."""
    git = ["git", "-C", str(TESTS), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "commit unknown"
    return f"{version('metatokens')}, {commit}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Campaign:
    """Rounds of faults, and their outcomes in a file if it is named."""

    def __init__(self, command: str, out: Path | None) -> None:
        """Go on with what the file holds, if it was written by the same command."""
        self._command, self._out = command, out
        self.seeds: list[int] = []
        self.outcomes: dict[str, Outcome] = {}
        if out is not None and out.exists():
            document = json.loads(out.read_text())
            if document["command"] != command:
                raise SystemExit(f"{out} is of another campaign: {document['command']}")
            self.seeds = document["seeds"]
            self.outcomes = {name: Outcome(**outcome) for name, outcome in document["outcomes"].items()}

    def do_round(self, kinds: Sequence[str], seed: int, times: float, shared: Path) -> None:
        """Do each kind of fault under a seed; a round that the file holds is passed over."""
        if seed in self.seeds:
            return
        found = {name: run_kind(name, KINDS[name], round(KINDS[name].times * times), seed, shared) for name in kinds}
        for name, outcome in found.items():
            self.outcomes.setdefault(name, Outcome(outcome.counts)).add(outcome)
        self.seeds.append(seed)
        if self._out is not None:
            part = self._out.with_name(f"{self._out.name}.part")
            part.write_text(json.dumps(self._document(), indent=2) + "\n")
            part.replace(self._out)

    def _document(self) -> dict[str, Any]:
        from metatokens.training.run_folder import versions

        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        return {"command": self._command, "seeds": self.seeds, "versions": versions(), "outcomes": outcomes}

    def show(self) -> None:
        say("")
        for name, outcome in self.outcomes.items():
            say(f"{name:28} {outcome.done:6} {outcome.counts}, {len(outcome.failures)} failed")
            for failure in outcome.failures:
                say(f"  {failure}")


def main() -> int:
    for name in MODULES:
        import_module(name)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--times", type=float, default=1.0, help="multiple of a short round")
    parser.add_argument("--rounds", type=int, default=1, help="each under a seed of its own")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--out", type=Path, help="JSON with the outcome; rounds that it holds are not done again")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    command = " ".join(["python tests/faults/campaign.py", *options.kinds, f"--times {options.times:g}"])
    campaign = Campaign(command, options.out)
    with tempfile.TemporaryDirectory(prefix="campaign-") as shared:
        for seed in range(options.seed, options.seed + options.rounds):
            campaign.do_round(kinds, seed, options.times, Path(shared))
    campaign.show()
    return int(any(outcome.failures for outcome in campaign.outcomes.values()))


if __name__ == "__main__":
    sys.modules["campaign"] = sys.modules["__main__"]  # the faults register here, not in a second copy
    sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "integration"), str(TESTS)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
