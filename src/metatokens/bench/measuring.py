"""From contenders to a result: turns, medians, limits and ratios, the same for every question."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch

from metatokens.bench.machine import COPY, MATRIX, READ, describe_machine, make_rates_turn
from metatokens.bench.turns import Rounds, Spread, Turn, ratio, spread, take_turns
from metatokens.config.bench import Bench
from metatokens.errors import UsageError
from metatokens.names import nearest_name

RATES = "limits of the machine"
Function = TypeVar("Function", bound=Callable[..., Any])


class Work(NamedTuple):
    """What a part of a turn has to do at least, whoever does it."""

    text_tokens: int
    """Predicted, written or read."""
    positions: int
    """Those and the meta-tokens, or whatever else stands in a sequence."""
    operations: float = 0
    """Of matrix products, a multiply and an add apart."""
    moved_bytes: float = 0
    """Read or written where no product hides it."""
    read_bytes: float = 0
    """Only read, as weights in a decoding step."""


class Contender(NamedTuple):
    """One of those that are compared."""

    turn: Turn
    work: Mapping[str, Work]
    """Of each part that the turn times."""
    facts: Mapping[str, Any] = {}
    """What was counted and not timed, such as bytes of a cache."""


class Pair(NamedTuple):
    """Two contenders whose ratio is asked for."""

    above: str
    below: str


@dataclass(frozen=True)
class Line:
    """A part of a contender's turn."""

    contender: str
    part: str
    seconds: Spread
    text_tokens: int
    positions: int
    microseconds_per_text_token: float
    microseconds_per_position: float
    limit_seconds: float | None
    """Operations over the measured matrix rate, and bytes over the measured rate of a copy, or of a read where they are
    only read; None where nothing is counted."""
    share_of_limit: float | None
    """Limit over seconds: 1 is as fast as the machine allows."""


@dataclass(frozen=True)
class Ratio:
    """Seconds of one contender over those of another, or bytes where no time is taken."""

    part: str
    above: str
    below: str
    per_text_token: Spread
    per_position: Spread


@dataclass(frozen=True)
class BenchResult:
    """What a question found."""

    question: str
    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rates: dict[str, Spread]
    """Measured operations a second and bytes a second."""
    contenders: dict[str, str]
    """What each of them is."""
    not_run: dict[str, str]
    """Why others did not take part."""
    lines: list[Line]
    ratios: list[Ratio]
    facts: dict[str, dict[str, Any]]
    rounds: Rounds = field(default_factory=dict)
    """The seconds of each round, from which all of it follows."""


class Registry(dict[str, Callable[..., Any]]):
    """The contenders of a question, by the names of their functions."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self._needs: dict[str, str] = {}

    def add(self, *, needs: str = "torch") -> Callable[[Function], Function]:
        """Add a function; its contender needs this package beside those of the base installation."""

        def register(function: Function) -> Function:
            self[function.__name__] = function
            self._needs[function.__name__] = needs
            return function

        return register

    def describe(self, name: str) -> str:
        """Return the first sentence of a contender's docstring."""
        return " ".join((self[name].__doc__ or "").split("\n\n")[0].split())

    def choose(self, wanted: Iterable[str] | None) -> tuple[list[str], dict[str, str]]:
        """Return the names of those that take part, and why others do not; None asks for all.

        Raises:
            UsageError: there is no such contender, or one that is asked for lacks its package.
        """
        for name in wanted or ():
            if name not in self:
                remedy = nearest_name(name, self) or "name some of them"
                raise UsageError("contenders", expected=f"some of {', '.join(self)}", found=repr(name), remedy=remedy)
        chosen, not_run = [], {}
        for name in self if wanted is None else wanted:
            package = self._needs[name]
            if find_spec(package) is not None:
                chosen.append(name)
            elif wanted is None:
                not_run[name] = f"{package} is not installed; pip install 'metatokens[bench]'"
            else:
                remedy = "pip install 'metatokens[bench]'"
                raise UsageError(name, expected=f"the package {package}", found="not installed", remedy=remedy)
        return chosen, not_run


def quiet(line: str) -> None:
    """Tell nobody of the progress."""
    del line


def measure(
    question: str,
    settings: Bench,
    registry: Registry,
    contenders: Mapping[str, Contender],
    *,
    pairs: Sequence[Pair],
    not_run: Mapping[str, str] | None = None,
    say: Callable[[str], None] = quiet,
) -> BenchResult:
    """Let contenders take turns and compare them.

    Args:
        question: its name.
        settings: of the question.
        registry: describes the contenders.
        contenders: those that take part, by name.
        pairs: the ratios that are asked for; those of contenders that do not take part are left out.
        not_run: why others do not.
        say: told of each round.
    """
    precision = getattr(settings, "precision", "float32")
    rates_turn, amounts = make_rates_turn(settings.device, precision)
    machine = describe_machine(settings.device)
    turns = {RATES: rates_turn} | {name: contender.turn for name, contender in contenders.items()}
    rounds = take_turns(
        turns,
        rounds=settings.rounds,
        warmup=settings.warmup,
        on_round=lambda index: say(f"round {index + 1} of {settings.warmup + settings.rounds}"),
    )
    seconds = rounds.pop(RATES)
    rates = {part: spread(amounts[part] / value for value in values) for part, values in seconds.items()}
    return BenchResult(
        question=question,
        command=" ".join(["metatokens", *sys.argv[1:]]),
        settings=settings.model_dump(mode="json"),
        machine=machine,
        rates=rates,
        contenders={name: registry.describe(name) for name in contenders},
        not_run=dict(not_run or {}),
        lines=[line for name, one in contenders.items() for line in _lines(name, one, rounds[name], rates)],
        ratios=[*_ratios(pairs, contenders, rounds)],
        facts={name: dict(contender.facts) for name, contender in contenders.items() if contender.facts},
        rounds=rounds,
    )


def set_threads(settings: Bench) -> None:
    """Let torch use as many threads as the settings say."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


def _lines(
    name: str, contender: Contender, parts: Mapping[str, Sequence[float]], rates: Mapping[str, Spread]
) -> Iterable[Line]:
    for part, values in parts.items():
        work, seconds = contender.work[part], spread(values)
        limit = work.operations / rates[MATRIX].median
        limit += work.moved_bytes / rates[COPY].median + work.read_bytes / rates[READ].median
        yield Line(
            contender=name,
            part=part,
            seconds=seconds,
            text_tokens=work.text_tokens,
            positions=work.positions,
            microseconds_per_text_token=1e6 * seconds.median / work.text_tokens,
            microseconds_per_position=1e6 * seconds.median / work.positions,
            limit_seconds=limit or None,
            share_of_limit=limit / seconds.median if limit else None,
        )


def _ratios(pairs: Sequence[Pair], contenders: Mapping[str, Contender], rounds: Rounds) -> Iterable[Ratio]:
    for above, below in pairs:
        if above not in contenders or below not in contenders:
            continue
        for part, values in rounds[above].items():
            if part not in rounds[below]:
                continue
            one, other = contenders[above].work[part], contenders[below].work[part]
            yield Ratio(
                part=part,
                above=above,
                below=below,
                per_text_token=ratio(values, rounds[below][part], other.text_tokens / one.text_tokens),
                per_position=ratio(values, rounds[below][part], other.positions / one.positions),
            )
