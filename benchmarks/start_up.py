"""What does starting cost: an import, the help, and all that comes before the first training step?

    python benchmarks/start_up.py --out benchmarks/results/start_up.json

Each stage is a process of its own, and they take turns, round by round. A stage contains those before it, except that
the help needs no torch, so the difference of two neighbours is what the later one adds. Seconds are medians, of the
processor and of the clock; the processor's are nearly the same beside other work. The first training step is that of
`tiny/meta` on the documentation inside of this Python, with the checkpoint that a run of one step leaves.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

METATOKENS = "import sys; from metatokens.cli import main; sys.exit(main(sys.argv[1:]))"
STAGES: dict[str, list[str]] = {
    "python": ["pass"],
    "import metatokens": ["import metatokens"],
    "metatokens --help": [METATOKENS, "--help"],
    "import torch": ["import torch"],
    "import transformers' models": ["import torch, transformers.modeling_utils"],
    "import metatokens.model": ["import metatokens.model"],
    "import the training": ["import metatokens.training.pretraining"],
}
FIRST_STEP = "first training step"
AIMS = {"import metatokens": 0.1, "metatokens --help": 0.3}


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Run Python with a script and arguments, and return the seconds of the processor and of the clock."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)
    elapsed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, elapsed


def measure(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    tokens = folder / "tokens"
    seconds_of([METATOKENS, "prepare", "python-docs", "--out", str(tokens)])
    options = ["--data.path", str(tokens), "--steps", "1", "--evaluation.interval_steps", "null"]
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds):
        run = [METATOKENS, "pretrain", "tiny/meta", "--out", str(folder / f"run-{number}"), *options]
        for stage, arguments in {**STAGES, FIRST_STEP: run}.items():
            found.setdefault(stage, []).append(seconds_of(arguments))
    return {
        stage: {
            "processor_seconds": statistics.median(processor for processor, _ in all_rounds),
            "seconds": statistics.median(clock for _, clock in all_rounds),
        }
        for stage, all_rounds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = measure(options.rounds, Path(folder))
    report: dict[str, Any] = {
        "question": "what starting costs, up to the first training step",
        "command": "python benchmarks/start_up.py --out FILE",
        "device": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "numpy")},
        "rounds": options.rounds,
        "aims_seconds": AIMS,
        "stages": stages,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
