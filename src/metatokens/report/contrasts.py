"""Every contrast of a sweep with its reference: all panels, arms and lengths that were named before it ran.

The unit is the training seed: differences of seeds are tested by sign flips, and all p-values of a sweep are corrected
together (Holm). Alike is a finding of its own, an equivalence test at a margin, and not the absence of a difference:

    higher, lower     the corrected p-value of the difference is at most the level
    alike             the corrected p-value of a difference beyond the margin is
    too few seeds     with so few no p-value could have passed the correction for all
    cannot tell       neither, with enough seeds

Evaluations that take something from the meta-tokens compare each arm with itself in full, and are not contrasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from metatokens.evaluation.significance import equivalence_test, holm, least_units, sign_flip_test
from metatokens.report.sweep_results import AccuracyRow, SweepResults, arm_name, panels

LEVEL = 0.05
"""Of the corrected p-values."""
MARGIN = 0.05
"""Accuracies that differ by less count as alike."""


@dataclass(frozen=True)
class Contrast:
    """One arm minus the reference, at one length."""

    panel: str
    evaluation: str
    arm: str
    length: str
    differences: tuple[float, ...]
    """Sequence accuracy minus the reference's, for each seed."""
    p_value: float
    """Of the difference; corrected over all contrasts of the sweep."""
    equivalence_p: float
    """Of a difference beyond `MARGIN`; corrected likewise."""
    verdict: str

    @property
    def mean(self) -> float:
        """The difference over seeds."""
        return sum(self.differences) / len(self.differences)


def contrasts(results: SweepResults) -> list[Contrast]:
    """Return every contrast of a sweep with the reference; those without the differences of seeds are left out."""
    found = list(_measured(results))
    least = least_units(len(found), LEVEL)
    columns = [holm([getattr(one, name) for one in found]).tolist() for name in ("p_value", "equivalence_p")]
    return [
        replace(one, p_value=p, equivalence_p=alike, verdict=verdict(one.mean, p, alike, len(one.differences), least))
        for one, p, alike in zip(found, *columns, strict=True)
    ]


def verdict(difference: float, p_value: float, equivalence_p: float, num_seeds: int, least_seeds: int) -> str:
    """Return what the corrected p-values of a contrast say."""
    if num_seeds < least_seeds and min(p_value, equivalence_p) > LEVEL:
        return f"too few seeds ({num_seeds}, at least {least_seeds} needed)"
    if p_value <= LEVEL:
        return "higher" if difference > 0 else "lower"
    return f"alike within {100 * MARGIN:.0f} points" if equivalence_p <= LEVEL else "cannot tell"


def contrast_rows(results: SweepResults) -> Iterator[tuple[str, str, str, AccuracyRow]]:
    """Yield panel, evaluation, arm and row of everything that is compared with the reference."""
    for panel, cells in panels(results).items():
        for cell in cells:
            for evaluation in cell.evaluations:
                if not evaluation.interventions:
                    for row in evaluation.rows:
                        if row.difference is not None:
                            yield panel, evaluation.name, arm_name(results, cell), row


def _measured(results: SweepResults) -> Iterator[Contrast]:
    for panel, evaluation, arm, row in contrast_rows(results):
        if differences := row.difference_by_seed:
            p_value = sign_flip_test(differences, seed=0)
            alike = equivalence_test(differences, MARGIN, seed=0)
            yield Contrast(panel, evaluation, arm, row.length, tuple(differences), p_value, alike, "")
