"""What every endpoint of contrasts shares: the task that is judged, and the words of a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from metatokens.config.contrasts import Contrasts
from metatokens.evaluation.significance import holm, least_units
from metatokens.report.sweep_results import CellResult, SweepResults
from metatokens.training.costs import SECONDS_PER_HOUR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

_SMALLEST_SHARE = 0.01  # of simulated experiments that a table states


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


class PowerRow(NamedTuple):
    """What a design can find in one contrast."""

    names: list[str]
    deviation: str
    smallest: str
    """The smallest effect found in 80% of cases; empty if none is."""
    equal_found_equivalent: float | None


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


def correct_p_values(rows: "Sequence[dict[str, Any]]") -> None:
    """Add `p_holm` and `p_equivalence_holm` to the contrasts of a task, corrected after Holm over all of them."""
    for key in ("p", "p_equivalence"):
        for row, adjusted in zip(rows, holm([row[key] for row in rows]).tolist(), strict=True):
            row[f"{key}_holm"] = adjusted


def verdict_of_seeds(
    row: "Mapping[str, Any]", contrasts: Contrasts, *, num_tests: int, num_seeds: int, is_as_expected: bool
) -> str:
    """Return the verdict of a contrast whose p-values are those of sign flips over seeds, and corrected.

    Args:
        row: with both corrected p-values and what is expected.
        contrasts: the file that names it.
        num_tests: among which it was corrected.
        num_seeds: so few that nothing could have passed are said to be too few.
        is_as_expected: see `verdict`.
    """
    differs, is_alike = (row[key] <= contrasts.level for key in ("p_holm", "p_equivalence_holm"))
    if not differs and not is_alike and num_seeds < least_units(num_tests, contrasts.level):
        return "too few seeds"
    return verdict(differs=differs, is_as_expected=is_as_expected, is_alike=is_alike, expected=row["expected"])


def seeds_text(report: "Mapping[str, Any]") -> str:
    """Return how many seeds every arm has finished, and of how many if some are missing."""
    finished, planned = len(report["seeds"]), report["planned_seeds"]
    return f"{finished} seeds" if finished == planned else f"{finished} of {planned} seeds so far"


def power_table(names: "Sequence[str]", spread: str, effect: str, rows: "Sequence[PowerRow]") -> list[str]:
    """Write what a design can find in each contrast, line by line.

    Args:
        names: the heads of the columns that name a contrast.
        spread: what `deviation` is of.
        effect: the head of the smallest effect found.
        rows: of the contrasts.
    """
    heads = [*names, f"standard deviation of {spread}", effect, "equivalence found"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(names) + "---:|" * 3]
    for row in rows:
        share = row.equal_found_equivalent
        found = "-" if share is None else "<1%" if share < _SMALLEST_SHARE else f"{share:.0%}"
        lines.append(f"| {' | '.join([*row.names, row.deviation or '-', row.smallest or '-', found])} |")
    return lines


def verdict(*, differs: bool, is_as_expected: bool, is_alike: bool, expected: str) -> str:
    """Put what the tests found into words.

    Args:
        differs: whether the first arm was found to differ from the second.
        is_as_expected: whether the first side is on the side of the second that was expected, as lower or faster.
        is_alike: whether the difference was found to be within the margin.
        expected: see `Contrast`.
    """
    if not differs:
        return "equivalent" if is_alike else "cannot tell"
    found = "differs" if expected == "equivalent" else "supported" if is_as_expected else "opposite"
    return f"{found}, within the margin" if is_alike else found
