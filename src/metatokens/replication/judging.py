"""What every endpoint shares: the file that names the contrasts, the task that is judged, the words of a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from pydantic import Field, model_validator

from metatokens.config.schema import Frozen
from metatokens.report.sweep_results import CellResult, SweepResults
from metatokens.training.costs import SECONDS_PER_HOUR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column


class Contrast(Frozen):
    """Two arms, and what their difference would explain."""

    explains: str
    first: str
    second: str
    expected: Literal["faster", "lower", "equivalent"]
    """What the explanation predicts of the first arm; a control is expected to be equivalent."""


class Contrasts(Frozen):
    """A file of contrasts, which is fixed before the first run."""

    endpoint: Literal["solve", "nats"] = "solve"
    """What is compared: the steps until a task is solved, or nats per word on a text."""
    evaluation: str = ""
    """Of `nats`, the name of the perplexity in the sweep."""
    level: float = Field(0.05, gt=0, lt=1)
    """Of the p-values, which are corrected after Holm over the contrasts of a task."""
    margin: float = Field(gt=0)
    """Arms that differ by less are equivalent: a ratio of steps, or nats per word."""
    tasks: dict[str, int] = Field(min_length=1)
    """Sweeps, and the seeds of their arms."""
    contrasts: tuple[Contrast, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint == "solve" and self.margin <= 1:
            raise ValueError("the margin of solve is a ratio above 1")
        if (self.endpoint == "nats") != bool(self.evaluation):
            raise ValueError("nats needs an evaluation, and solve has none")
        if any(contrast.first == contrast.second for contrast in self.contrasts):
            raise ValueError("contrasts compares an arm with itself")
        return self

    @property
    def arms(self) -> set[str]:
        """All arms that are compared."""
        return {arm for contrast in self.contrasts for arm in (contrast.first, contrast.second)}


class FinishedTask(NamedTuple):
    """What a sweep has finished so far."""

    name: str
    planned_seeds: int
    seeds: list[int]
    """That every arm has finished."""
    arms: dict[str, CellResult]
    """Those that are compared, in the order of the sweep."""
    results: SweepResults
    folder: Path
    sweep_file: Path

    @property
    def cpu_hours(self) -> float:
        """The processor time of all its trainings."""
        return sum(one.cpu_seconds for cell in self.results.cells for one in cell.trainings) / SECONDS_PER_HOUR


class Endpoint(Protocol):
    """A module that judges contrasts."""

    FEWEST_SEEDS: int
    """With fewer nothing is reported."""

    def judge(self, contrasts: Contrasts, task: FinishedTask) -> dict[str, Any]:
        """Return the report of a task, as JSON can hold it."""
        ...

    def to_markdown(self, contrasts: Contrasts, reports: "Sequence[dict[str, Any]]") -> str:
        """Write the reports as tables."""
        ...

    def draw(self, contrasts: Contrasts, reports: "Sequence[dict[str, Any]]") -> "Mapping[str, Figure]":
        """Draw the reports, by the ends of the files' names; the first is empty."""
        ...

    def columns(self, contrasts: Contrasts, report: dict[str, Any]) -> "dict[str, Column]":
        """Return the verdicts of a report by the name of their column in the summary."""
        ...


def verdict(*, differs: bool, is_less: bool, is_alike: bool, expected: str) -> str:
    """Put what the tests found into words.

    Args:
        differs: whether the first arm was found to differ from the second.
        is_less: whether it needs or loses less.
        is_alike: whether the difference was found to be within the margin.
        expected: see `Contrast`.
    """
    if not differs:
        return "equivalent" if is_alike else "cannot tell"
    found = "differs" if expected == "equivalent" else "supported" if is_less else "opposite"
    return f"{found}, within the margin" if is_alike else found
