"""A campaign of faults against real runs; `make test-faults`, or for longer ones

    nice -n 19 .venv/bin/python tests/faults/campaign.py --times 100 --seed 1 --out campaign.json

Each fault is a function with `@fault(...)`: it does one piece of work on a run of its own, harms it, and returns how
often; it fails by an assertion if a result differs or something was lost. A new kind is one function, in a file that
`MODULES` names. Everything that a fault draws comes from `case.random`, so the seed that a failure prints repeats it.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODULES = ("kills",)


@dataclass
class Case:
    """One piece of work of a fault."""

    random: random.Random
    folder: Path
    """An empty folder of its own."""
    shared: Path
    """A folder of the whole campaign, for what is made once, such as runs to compare with."""


Fault = Callable[[Case], int]


@dataclass(frozen=True)
class Kind:
    """A fault, and how often a campaign does it."""

    act: Fault
    counts: str
    """What the number that it returns counts, such as "kills survived"."""
    times: int
    """How many in a short campaign; `--times` multiplies it."""


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


def run_kind(name: str, kind: Kind, times: int, seed: int, shared: Path) -> Outcome:
    """Do one kind of fault until it was done so often."""
    outcome, began = Outcome(kind.counts), time.monotonic()
    # a fault that fails every time must end too
    while outcome.done < times and len(outcome.failures) < 1 + times // 10:
        own_seed = f"{seed}/{name}/{outcome.cases}"
        with tempfile.TemporaryDirectory(prefix="fault-") as folder:
            try:
                outcome.done += kind.act(Case(random.Random(own_seed), Path(folder), shared))
            except Exception as error:  # noqa: BLE001 - whatever went wrong is the result
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome.failures.append(f"seed {own_seed}: {type(error).__name__}: {error} ({where.name})")
        outcome.cases += 1
        outcome.seconds = round(time.monotonic() - began, 1)
        say(f"{name:28} {outcome.done:6} of {times} {kind.counts}, {len(outcome.failures)} failed")
    return outcome


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    for name in MODULES:
        import_module(name)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--times", type=float, default=1.0, help="multiple of a short campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON with the outcome, written after every kind")
    options = parser.parse_args()
    command = " ".join(["python", "tests/faults/campaign.py", *sys.argv[1:]])
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="campaign-") as shared:
        for name in options.kinds or KINDS:
            kind = KINDS[name]
            outcomes[name] = run_kind(name, kind, round(kind.times * options.times), options.seed, Path(shared))
            if options.out is not None:
                document = {"command": command, "outcomes": {key: asdict(value) for key, value in outcomes.items()}}
                options.out.write_text(json.dumps(document, indent=2) + "\n")
    say("")
    for name, outcome in outcomes.items():
        say(f"{name:28} {outcome.done:6} {outcome.counts}, {len(outcome.failures)} failed")
        for failure in outcome.failures:
            say(f"  {failure}")
    return int(any(outcome.failures for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.modules["campaign"] = sys.modules["__main__"]  # the faults register here, not in a second copy
    sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "integration"), str(TESTS)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
