"""What does it cost that glibc gives freed memory back to the system?

    python benchmarks/allocation.py --out benchmarks/results/allocation.json

glibc maps each tensor of more than 32 MiB anew and trims the top of the heap, so a step pays for the same pages again.
Processes in which `mallopt` forbids both, and others, take turns. Each takes training steps with GPT-2's vocabulary,
and reads a prompt of 1,024 text tokens with 12 layers. Figures: seconds of the clock and in the system, page faults.
"""

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metatokens.bench import training
from metatokens.bench.generation_contenders import GENERATION, make_prompts
from metatokens.bench.machine import describe_machine
from metatokens.bench.turns import ratio, spread
from metatokens.config.bench import GenerationBench, TrainingBench
from metatokens.model.schedule import schedule_meta_tokens

REPEATS = 4
TRIM_THRESHOLD, MMAP_THRESHOLD, NEVER = -1, -3, 2**31 - 1
"""Arguments of mallopt(3)."""


def keep_freed_memory() -> None:
    """Ask glibc's malloc to keep what is freed."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(TRIM_THRESHOLD, NEVER) == libc.mallopt(MMAP_THRESHOLD, NEVER) == 1


def training_step(small: bool) -> Callable[[], Any]:
    """Return a training step of the model with meta-tokens."""
    settings = TrainingBench(vocabulary=500, length=64, hidden_size=48) if small else TrainingBench(vocabulary=50_257)
    return training.training_step("meta_indices", settings)


def prompt(small: bool) -> Callable[[], Any]:
    """Return the reading of a prompt with meta-tokens."""
    settings = GenerationBench(prompt=32, hidden_size=48) if small else GenerationBench()
    prompts = make_prompts(settings)
    continuation = GENERATION["meta_steps"](settings, prompts._replace(num_new=1))
    model: Any = continuation.model
    row = schedule_meta_tokens(prompts.rows[0], prompts.schedule, meta_token_id=model.config.meta_token_id)
    ids = torch.tensor([row])

    @torch.no_grad()
    def read() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    return read


TASKS = {"training step": training_step, "prompt": prompt}


def measure_here(small: bool) -> dict[str, dict[str, float]]:
    """Return the figures of each task in this process, per repeat."""
    found = {}
    for name, make in TASKS.items():
        work = make(small)
        work()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(REPEATS):
            work()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        found[name] = {
            "seconds": seconds / REPEATS,
            "system_seconds": (after.ru_stime - before.ru_stime) / REPEATS,
            "page_faults": (after.ru_minflt - before.ru_minflt) / REPEATS,
        }
    return found


def main() -> None:
    """Let processes of both kinds take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", choices=("kept", "given back"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        if options.here == "kept":
            keep_freed_memory()
        print(json.dumps(measure_here(options.small)))
        return
    machine = describe_machine("cpu")
    found: dict[str, list[dict[str, dict[str, float]]]] = {"kept": [], "given back": []}
    for index in range(options.rounds):
        for way in found if index % 2 == 0 else reversed([*found]):
            command = [sys.executable, __file__, "--here", way, *(["--small"] if options.small else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    results = {}
    for task in TASKS:
        seconds = {way: [one[task]["seconds"] for one in rounds] for way, rounds in found.items()}
        medians = {
            way: {figure: spread(one[task][figure] for one in rounds).median for figure in rounds[0][task]}
            for way, rounds in found.items()
        }
        results[task] = {"kept over given back": vars(ratio(seconds["kept"], seconds["given back"])), **medians}
    text = json.dumps(
        {"command": " ".join(["python", *sys.argv]), "machine": machine, "results": results, "rounds": found}, indent=2
    )
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
