"""How much memory does a training step take at its peak, with and without meta-tokens?

Each contender of `metatokens.bench.training` takes two steps in a process of its own. The figure is the peak of that
process: on the CPU its largest resident size (Linux), on a GPU what torch has allocated there. What it takes without a
model is noted beside it, and a ratio compares what is beyond.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from metatokens.bench.machine import describe_machine
from metatokens.bench.measuring import BenchResult, Pair, Ratio, quiet, set_threads
from metatokens.bench.processes import bytes_of_process, run_apart
from metatokens.bench.sequences import make_sequences
from metatokens.bench.training import build, contend
from metatokens.bench.training_contenders import TRAINING, Shape
from metatokens.bench.turns import ratio, spread, take_turns
from metatokens.config.bench import MemoryBench, TrainingBench

REGISTRY = TRAINING
PAIRS = (
    Pair("meta", "plain"),
    Pair("meta_indices", "plain"),
    Pair("meta_indices", "plain_text"),
    Pair("dense", "meta_indices"),
    Pair("plain", "gpt2"),
)
PEAK, BEFORE, BEYOND = "peak bytes", "bytes before the model", "bytes beyond"
STEPS = 2


def run(settings: MemoryBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = TRAINING.choose(settings.contenders)
    set_threads(settings)
    machine = describe_machine(settings.device)
    fields = settings.model_dump(mode="json") | {"parts": ["whole"]}
    turns = {name: partial(run_apart, measure_here, name, fields) for name in names}
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
        machine=machine,
        rates={},
        contenders={name: TRAINING.describe(name) for name in names},
        not_run=not_run,
        lines=[],
        ratios=ratios,
        facts=facts,
        rounds=rounds,
    )


def measure_here(name: str, fields: dict[str, Any]) -> dict[str, float]:
    """Take the steps in this process and return its peak; it must have done nothing of the kind before."""
    settings = TrainingBench(**fields)
    set_threads(settings)
    before = bytes_of_process(settings.device, "VmRSS")
    sequences = make_sequences(settings, Shape(settings, settings.length).meta_token_id)
    contender = contend(build(name, Shape(settings, settings.length), sequences), settings, sequences)
    for _ in range(STEPS):
        contender.turn()
    peak = bytes_of_process(settings.device, "VmHWM")
    return {PEAK: peak, BEFORE: before, BEYOND: peak - before}
