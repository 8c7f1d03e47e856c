"""How much memory does a training step take at its peak, with and without meta-tokens?

Each contender of `metatokens.bench.training` takes two steps in a process of its own. The figure is the peak of that
process: on the CPU its largest resident size (Linux), on a GPU what torch has allocated there. What it takes without a
model is noted beside it, and a ratio compares what is beyond.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from metatokens.bench.machine import describe_machine
from metatokens.bench.measuring import BenchResult, Pair, Ratio, quiet, set_threads
from metatokens.bench.sequences import make_sequences
from metatokens.bench.training import build, contend
from metatokens.bench.training_contenders import TRAINING, Shape
from metatokens.bench.turns import ratio, spread, take_turns
from metatokens.config.bench import MemoryBench, TrainingBench
from metatokens.errors import UsageError

REGISTRY = TRAINING
PAIRS = (
    Pair("meta", "plain"),
    Pair("meta_indices", "plain"),
    Pair("meta_indices", "plain_text"),
    Pair("dense", "meta_indices"),
    Pair("plain", "gpt2"),
)
PEAK, BEFORE, BEYOND = "peak bytes", "bytes before the model", "bytes beyond"
# glibc would keep freed tensors for later ones, and their fragments would count as memory in use
EXACT_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
STEPS = 2


def run(settings: MemoryBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = TRAINING.choose(settings.contenders)
    turns = {name: partial(_measure_apart, name, settings) for name in names}
    rounds = take_turns(
        turns,
        rounds=settings.rounds,
        warmup=settings.warmup,
        on_round=lambda index: say(f"round {index + 1} of {settings.warmup + settings.rounds}"),
    )
    ratios = [
        Ratio(BEYOND, above, below, figure, figure)
        for above, below in PAIRS
        if above in rounds and below in rounds
        for figure in [ratio(rounds[above][BEYOND], rounds[below][BEYOND])]
    ]
    facts = {
        name: {part.replace(" ", "_"): round(spread(values).median) for part, values in parts.items()}
        for name, parts in rounds.items()
    }
    return BenchResult(
        question="memory",
        command=" ".join(["metatokens", *sys.argv[1:]]),
        settings=settings.model_dump(mode="json"),
        machine=describe_machine(settings.device),
        rates={},
        contenders={name: TRAINING.describe(name) for name in names},
        not_run=not_run,
        lines=[],
        ratios=ratios,
        facts=facts,
        rounds=rounds,
    )


def measure_here(name: str, settings: TrainingBench) -> dict[str, float]:
    """Take the steps in this process and return its peak; it must have done nothing of the kind before."""
    set_threads(settings)
    before = _bytes_of_process(settings.device, "VmRSS")
    sequences = make_sequences(settings, Shape(settings, settings.length).meta_token_id)
    contender = contend(build(name, Shape(settings, settings.length), sequences), settings, sequences)
    for _ in range(STEPS):
        contender.turn()
    peak = _bytes_of_process(settings.device, "VmHWM")
    return {PEAK: peak, BEFORE: before, BEYOND: peak - before}


def _measure_apart(name: str, settings: MemoryBench) -> Mapping[str, float]:
    fields = settings.model_dump(mode="json") | {"parts": ["whole"]}
    script = (
        "import json, sys; from metatokens.bench.memory import measure_here; from metatokens.config.bench import "
        "TrainingBench; print(json.dumps(measure_here(sys.argv[1], TrainingBench(**json.loads(sys.argv[2])))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, name, json.dumps(fields)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | EXACT_ALLOCATION,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _bytes_of_process(device: str, field: str) -> float:
    """Return VmHWM, the peak, or VmRSS, what is resident now; on a GPU what torch has allocated there."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        # ru_maxrss elsewhere holds what the parent had at its peak
        raise UsageError("bench memory", expected="Linux or --device cuda", found=sys.platform, remedy="run it there")
    (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field)]
    return 1024 * float(line.split()[1])
