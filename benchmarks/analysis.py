"""What does it cost to measure attention, beside storing it? A 152M model, k = 0.1, every layer, head and query.

The ways are the contenders of `metatokens bench analysis`, each in a process of its own, so that its peak memory is its
own, and all in turns, round by round; `stored` where memory allows.

Seconds per 1,000 tokens are those of the processor, which a machine shared with other work leaves alone; `more` is what
a way takes beside the forward pass.

    python benchmarks/analysis.py --threads 1 --out benchmarks/results/analysis_cpu.json
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from metatokens.bench.analysis import make_ids, make_look
from metatokens.bench.analysis_contenders import ANALYSIS, QUERIES
from metatokens.config.bench import AnalysisBench
from metatokens.config.schema import ModelConfig, UniformInjection

WAYS = tuple(ANALYSIS)
META_RATIO = 0.1
FLOAT_BYTES = 4
ROOM = 1.3  # measured at 4,096 tokens: 1.21 times the weights, model and all


def measure_here(way: str, length: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    settings = AnalysisBench(length=length, ratio=META_RATIO)
    ids = make_ids(settings)
    look = make_look(settings, way)
    look(ids[:, :128])
    started, used = time.perf_counter(), time.process_time()
    entropy = look(ids)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "mean_entropy": entropy,
    }


def measure_apart(way: str, length: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", way, "--lengths", str(length), "--threads", str(threads)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout)
    print(json.dumps({"length": length, "way": way, **measured}), file=sys.stderr)
    return measured


def weights_bytes(length: int) -> int:
    """Return the size of all attention weights of the model."""
    shape = ModelConfig()
    num_meta = UniformInjection(ratio=META_RATIO).num_meta(length)
    return shape.num_hidden_layers * shape.num_attention_heads * (length**2 + num_meta**2) * FLOAT_BYTES


def available_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def measure_length(length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    fits = weights_bytes(length) * ROOM < available_bytes()
    ways = [way for way in options.ways if way != "stored" or fits]
    rounds = [{way: measure_apart(way, length, options.threads) for way in ways} for _ in range(options.rounds)]
    results = []
    for way in options.ways:
        if way not in ways:
            size = round(weights_bytes(length) / 1e9, 1)
            results.append({"length": length, "way": way, "not_run": f"the weights alone are {size} GB"})
            continue
        runs = [one[way] for one in rounds]
        median = {
            name: statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds", "peak_bytes")
        }
        result = {
            "length": length,
            "way": way,
            "seconds": round(median["seconds"], 2),
            "cpu_seconds": round(median["cpu_seconds"], 2),
            "cpu_seconds_per_1k_tokens": round(median["cpu_seconds"] / length * 1000, 3),
            "peak_megabytes": round(median["peak_bytes"] / 1e6),
            "mean_entropy": runs[0]["mean_entropy"],
        }
        if way != "forward" and "forward" in ways:
            # of one round each, since what the machine gives changes from round to round
            more = [one[way]["cpu_seconds"] - one["forward"]["cpu_seconds"] for one in rounds]
            more_bytes = [one[way]["peak_bytes"] - one["forward"]["peak_bytes"] for one in rounds]
            result["more_cpu_seconds_per_1k_tokens"] = round(statistics.median(more) / length * 1000, 3)
            result["more_megabytes_per_1k_tokens"] = round(statistics.median(more_bytes) / 1e6 / length * 1000, 1)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(options.child, options.lengths[0], options.threads)))
        return
    report = {
        "command": "python " + " ".join(sys.argv),
        "meta_ratio": META_RATIO,
        "queries": QUERIES.count,
        "device": platform.machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": [result for length in options.lengths for result in measure_length(length, options)],
    }
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
