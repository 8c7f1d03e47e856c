"""The records of single trainings, finished or not: steps, words right at each evaluation, processor time.

results.json has means over seeds; here is every seed. A training that was cut short is kept with the steps it got.

    python experiments/tiny-memory/records.py OUT --out experiments/tiny-memory/runs.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from metatokens.storage import write_atomically


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _tree(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def record(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the training in a run folder OUT/SWEEP/runs/ARM/seed-N; None before its first step."""
    lines = _lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "token_accuracy" in line]
    if not lines:
        return None
    result = _tree(folder / "result.json")
    cpu_seconds = _tree(folder / "cpu_seconds.json").get("cpu_seconds")
    return {
        "sweep": folder.parents[2].name,
        "arm": folder.parent.name,
        "seed": int(folder.name.removeprefix("seed-")),
        "steps": max(line["step"] for line in lines),
        "state": "cut short" if not result else "solved" if result["solved"] else "censored",
        "evaluated_at": [line["step"] for line in evaluations],
        "words_right": [round(line["token_accuracy"], 4) for line in evaluations],
        "answers_right": [round(line["sequence_accuracy"], 4) for line in evaluations],
        "cpu_seconds": cpu_seconds if result else None,
        "versions": _tree(folder / "versions.json"),
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the replication")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = [record(folder) for folder in sorted(options.folder.glob("*/runs/*/seed-*"))]
    runs = sorted((one for one in found if one), key=lambda one: (one["sweep"], one["seed"], one["arm"]))
    write_atomically(options.out, json.dumps({"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
