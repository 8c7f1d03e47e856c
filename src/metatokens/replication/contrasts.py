"""Contrasts between arms that are named before the first run, judged from what the sweeps of a part have left.

A file of contrasts has the contrasts, the margin within which arms count as equivalent, and what is compared:

    endpoint: nats
    margin: 0.05
    tasks: {e4: 3}          # sweeps, and their seeds
    contrasts:
      - {explains: channel, first: meta, second: pause, expected: lower}

The next endpoint is one module beside `solve_times` and `losses`, and its name in `ENDPOINTS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from metatokens.replication import losses, solve_times
from metatokens.storage import write_atomically

if TYPE_CHECKING:
    from metatokens.report.verdict_figure import Column

ENDPOINTS = {"solve": solve_times, "nats": losses}
_DEFAULT_ENDPOINT = "solve"


def write_contrasts(files: Path, contrasts: str, out: Path, *, name: str) -> None:
    """Judge the contrasts so far, and write NAME.json, NAME.md and figures, NAME.png among them.

    Nothing is written if nothing can be judged yet.

    Args:
        files: folder of the sweeps.
        contrasts: name of the file of contrasts in it.
        out: folder of the results, which also gets the files.
        name: of the part.
    """
    text = (files / contrasts).read_text(encoding="utf-8")
    plan = yaml.safe_load(text)
    endpoint = ENDPOINTS[plan.get("endpoint", _DEFAULT_ENDPOINT)]
    reports = list(endpoint.judge(plan, files, out))
    if not reports:
        return
    digest = hashlib.sha256(text.encode()).hexdigest()
    tree = {"contrasts_sha256": digest, "endpoint": plan.get("endpoint", _DEFAULT_ENDPOINT), "tasks": reports}
    write_atomically(out / f"{name}.json", json.dumps(tree, indent=1) + "\n")
    write_atomically(out / f"{name}.md", endpoint.to_markdown(plan, reports))
    from metatokens.report.figures import to_png  # matplotlib is an extra

    for ending, figure in endpoint.draw(plan, reports).items():
        write_atomically(out / f"{name}{ending}.png", to_png(figure))


def write_summary(judged: Sequence[Path], out: Path) -> None:
    """Write explanations.md and explanations.png: every contrast in every task with its verdict, side by side.

    Args:
        judged: what `write_contrasts` wrote, a JSON file of each part.
        out: folder of the two files; nothing is written if there is no contrast.
    """
    columns: dict[str, Column] = {}
    for path in judged:
        tree = json.loads(path.read_text(encoding="utf-8"))
        endpoint = ENDPOINTS[tree.get("endpoint", _DEFAULT_ENDPOINT)]  # files older than the second endpoint name none
        for report in tree["tasks"]:
            columns |= endpoint.columns(report)
    if not columns:
        return
    from metatokens.report.figures import to_png  # matplotlib is an extra
    from metatokens.report.verdict_figure import draw_verdicts, verdict_table

    write_atomically(out / "explanations.md", "\n".join([*verdict_table(columns), ""]))
    write_atomically(out / "explanations.png", to_png(draw_verdicts(columns)))
