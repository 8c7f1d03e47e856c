"""Contrasts between arms that are named before the first run, judged from what the sweeps of a part have left.

A file of contrasts (`Contrasts`) has the contrasts, the margin within which arms count as equivalent, and what is
compared:

    endpoint: nats
    evaluation: books
    margin: 0.1
    tasks: {e4: 3}          # sweeps, and their seeds
    contrasts:
      - {explains: channel, first: meta, second: pause, expected: lower}

A contrast is drawn from the seeds that every arm has finished, so a sweep that is still running gives an interim
result. The next endpoint is one module beside `solve_times`, `losses` and `accuracies`, and its name in `ENDPOINTS` and
`Contrasts`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from metatokens.config.contrasts import Contrasts
from metatokens.config.loading import read_file
from metatokens.replication import accuracies, losses, solve_times
from metatokens.replication.judging import Endpoint, FinishedTask
from metatokens.report.sweep_results import load_results
from metatokens.storage import text_sha256, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from metatokens.report.verdict_figure import Column

ENDPOINTS: dict[str, Endpoint] = {"solve": solve_times, "nats": losses, "accuracy": accuracies}


def write_contrasts(files: Path, contrasts: str, out: Path, *, name: str) -> Path | None:
    """Judge the contrasts so far, and write NAME.json, NAME.md and figures, NAME.png among them.

    Nothing is written if no task has enough seeds, and files of an earlier call are left as they are.

    Args:
        files: folder of the sweeps.
        contrasts: name of the file of contrasts in it.
        out: folder of the results, which also gets the files.
        name: of the part.

    Returns:
        NAME.json, or None if nothing was written.
    """
    named = read_file(files / contrasts, schema=Contrasts)
    endpoint = ENDPOINTS[named.endpoint]
    reports = [endpoint.judge(named, task) for task in _finished(named, files, out, endpoint.FEWEST_SEEDS)]
    if not reports:
        return None
    digest = text_sha256((files / contrasts).read_text(encoding="utf-8"))
    tree = {"contrasts_sha256": digest, "contrasts": named.model_dump(mode="json"), "tasks": reports}
    path = out / f"{name}.json"
    write_atomically(path, json.dumps(tree, indent=1) + "\n")
    write_atomically(out / f"{name}.md", endpoint.to_markdown(named, reports))
    from metatokens.report.figures import to_png  # matplotlib is an extra

    for ending, figure in endpoint.draw(named, reports).items():
        write_atomically(out / f"{name}{ending}.png", to_png(figure))
    return path


def write_summary(judged: Sequence[Path], out: Path) -> None:
    """Write explanations.md and explanations.png: every contrast in every task with its verdict, side by side.

    Parts with the same endpoint share a table and a panel of the figure.

    Args:
        judged: what `write_contrasts` wrote, a JSON file of each part.
        out: folder of the two files, which are removed if there is no contrast.
    """
    panels: dict[str, dict[str, Column]] = {}
    for path in judged:
        tree = json.loads(path.read_text(encoding="utf-8"))
        named = Contrasts.model_validate(tree["contrasts"])
        if not named.in_summary:
            continue
        for report in tree["tasks"]:
            panels.setdefault(named.endpoint, {}).update(ENDPOINTS[named.endpoint].columns(named, report))
    table, figure = out / "explanations.md", out / "explanations.png"
    if not panels:
        for path in (table, figure):
            path.unlink(missing_ok=True)
        return
    from metatokens.report.figures import to_png  # matplotlib is an extra
    from metatokens.report.verdict_figure import draw_verdicts, verdict_tables

    write_atomically(table, "\n".join(verdict_tables(list(panels.values()))))
    write_atomically(figure, to_png(draw_verdicts(list(panels.values()))))


def _finished(contrasts: Contrasts, files: Path, out: Path, fewest_seeds: int) -> Iterator[FinishedTask]:
    """Yield the tasks whose arms share enough finished seeds."""
    for task, planned_seeds in contrasts.tasks.items():
        if not (out / task / "results.json").is_file():
            continue
        results = load_results(out / task / "results.json")
        arms = {cell.labels["arm"]: cell for cell in results.cells if cell.labels["arm"] in contrasts.arms}
        if contrasts.arms - arms.keys():
            continue
        seeds = sorted(set.intersection(*(set(cell.seeds) for cell in arms.values())))
        if len(seeds) >= fewest_seeds:
            yield FinishedTask(task, planned_seeds, seeds, arms, results, out / task, files / f"{task}.yaml")
