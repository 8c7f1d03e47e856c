"""Run a sweep and write what it leaves: results.json and table.md after every run, and figures at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metatokens.report.sweep_results import SweepResults, load_results, to_json
from metatokens.report.tables import to_markdown
from metatokens.storage import write_atomically, write_sealed
from metatokens.sweep.collecting import collect
from metatokens.sweep.running import Slot, run_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from metatokens.config.sweep import SweepConfig
    from metatokens.report.sweep_results import FailedRun
    from metatokens.sweep.planning import SweepRun


def run_and_write(
    sweep: SweepConfig,
    runs: Sequence[SweepRun],
    out: Path,
    slots: Sequence[Slot],
    *,
    show_progress: bool = True,
    figures: bool = False,
) -> SweepResults:
    """Finish the runs that are not done, and return the results, which are written to `out` after every run.

    Raises:
        UsageError, Preempted: see `metatokens.sweep.running.run_sweep`.
    """

    def write(failed: Sequence[FailedRun]) -> None:
        results = collect(sweep, runs, out, failed)
        write_sealed(out / "results.json", to_json(results))
        write_atomically(out / "table.md", to_markdown(results))

    failed = run_sweep(runs, out, slots, show_progress=show_progress, on_finished=write)
    write(failed)
    results = load_results(out / "results.json")
    if figures:
        from metatokens.report.figures import draw_sweep

        draw_sweep(results, out / "figures")
    return results
