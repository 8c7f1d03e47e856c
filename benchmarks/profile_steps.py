"""What takes the time of a training step and of decoding? Operators under torch's profiler, by kind.

    python benchmarks/profile_steps.py --out benchmarks/results/profile_steps.json

The shapes are those of `metatokens bench training` and `metatokens bench generation`. A figure is the operators' own
time in the thread that calls them, which waits there for the other threads, as a share of that of all operators; for
products of matrices also operations a second. The profiler costs time with each call, so small operators look larger.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from metatokens.bench.generation_contenders import GENERATION, Clock, make_prompts
from metatokens.bench.machine import describe_machine
from metatokens.bench.training import training_step
from metatokens.config.bench import GenerationBench, TrainingBench

KINDS = {
    "products of matrices": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product",),
    "norms and activation": ("native_layer_norm", "gelu"),
    "loss": ("_log_softmax", "nll_loss", "logsumexp", "exp_"),
    "optimizer": ("_fused_adamw", "Optimizer"),
}
"""The beginnings of the names of their operators; what none of them has is "copies, sums and the rest"."""
REST = "copies, sums and the rest"
LARGEST = 12


def generation(name: str, settings: GenerationBench) -> Callable[[], Any]:
    """Return the continuation of a short prompt, so that nearly all of the time is decoding."""
    prompts = make_prompts(settings)
    found = GENERATION[name](settings, prompts)
    return lambda: found.run(Clock(-1, knows_prompt=found.knows_prompt))


def kind_of(operator: str) -> str:
    """Return the kind of an operator."""
    name = operator.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), REST)


def measure(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Profile some repeats of the work, after one that does not count."""
    work()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        for _ in range(repeats):
            work()
    seconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    operators = sorted(profiler.key_averages(), key=lambda found: -found.self_cpu_time_total)
    for found in operators:
        seconds[kind_of(found.key)] += found.self_cpu_time_total / 1e6
        flops[kind_of(found.key)] += found.flops
    whole = sum(seconds.values())
    products = "products of matrices"
    return {
        "seconds": whole / repeats,
        "shares": {kind: seconds[kind] / whole for kind in (*KINDS, REST)},
        "operations_per_second_of_products": flops[products] / seconds[products],
        "largest": [
            {"operator": found.key, "calls": found.count / repeats, "share": found.self_cpu_time_total / 1e6 / whole}
            for found in operators[:LARGEST]
        ],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = {"hidden_size": 48, "num_hidden_layers": 2, "vocabulary": 500} if options.small else {}
    close = TrainingBench(**size)
    many_words = TrainingBench(**({"vocabulary": 50_257} | size))
    decoding = GenerationBench(prompt=16, new=64, **size)
    tasks = {
        "step, plain": training_step("plain", close),
        "step, meta": training_step("meta_indices", close),
        "step, plain, GPT-2's vocabulary": training_step("plain", many_words),
        "decoding, plain": generation("plain_steps", decoding),
        "decoding, meta": generation("meta_steps", decoding),
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine("cpu"),
        "results": {name: measure(work, options.repeats) for name, work in tasks.items()},
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
