"""What does each measure of an analysis cost, in forward passes of the same texts?

    python benchmarks/analysis_measures.py RUN --text books/ --out benchmarks/results/analysis_measures.json

All measures run once, in one process and in the order of an analysis. Each is given in processor time over that of a
forward pass of all documents, one by one, without logits: the median of several passes, taken between the measures.
What several measures share is charged to the first that asks for it, which names it. `records` is the time for
intervals and tests. `--arguments` takes fields of an analysis as `metatokens analyze` does.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import record_of, run_measure
from metatokens.analysis.run import measures_of
from metatokens.analysis.token_view import views_of
from metatokens.training.loading import ModelFolder, analysis_config_of

PASSES_EVERY = 4  # measures


def processor_seconds(work: Any, *arguments: Any) -> tuple[float, Any]:
    started = time.process_time()
    made = work(*arguments)
    return time.process_time() - started, made


def forward_all(inputs: Inputs) -> None:
    for document in inputs.subject.documents:
        inputs.lens.run(document.input_ids)


def measure_all(inputs: Inputs) -> tuple[float, list[dict[str, Any]]]:
    """Return the processor seconds of a forward pass of all documents, and those of each measure."""
    forward_all(inputs)
    passes, found = [], []
    for part in dict.fromkeys(inputs.config.parts):
        for number, one in enumerate(measures_of(part, inputs.config)):
            if number % PASSES_EVERY == 0:
                passes.append(processor_seconds(forward_all, inputs)[0])
            before = set(inputs._shared)
            seconds, rows = processor_seconds(run_measure, one, inputs)
            of_records = [processor_seconds(lambda row: record_of(one, row, seed=0), row)[0] for row in rows]  # noqa: B023
            found.append(
                {
                    "measure": one.name,
                    "part": part,
                    "seconds": seconds,
                    "records_seconds": sum(of_records),
                    "rows": len(rows),
                    "shared": sorted(function.__name__ for function in set(inputs._shared) - before),
                }
            )
    if "token_view" in inputs.config.parts:
        seconds, _ = processor_seconds(views_of, inputs)
        found.append({"measure": "token_view", "part": "token_view", "seconds": seconds, "records_seconds": 0.0})
    return statistics.median(passes), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run, or the folder of a model")
    parser.add_argument("--text", help="a source of texts; without it the recall task of the run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="fields of the analysis, last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = ModelFolder(options.run)
    config = analysis_config_of(folder, options.text, options.arguments)
    made, inputs = processor_seconds(lambda: Inputs(folder.open_model().float(), folder.tokenizer, config))
    forward, found = measure_all(inputs)
    for one in found:
        one["forward_passes"] = one["seconds"] / forward
    total = sum(one["seconds"] + one["records_seconds"] for one in found)
    report = {
        "question": "cost of each measure in forward passes of the same texts",
        "command": "python benchmarks/analysis_measures.py RUN --text DIR --out FILE",
        "device": platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "documents": len(inputs.subject.documents),
        "positions": sum(document.input_ids.shape[1] for document in inputs.subject.documents),
        "forward_seconds": forward,
        "inputs_seconds": made,
        "total_seconds": total,
        "total_forward_passes": total / forward,
        "skipped": inputs.skipped,
        "measures": sorted(found, key=lambda one: -one["seconds"]),
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
