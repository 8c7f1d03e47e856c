"""A soak: one process trains, is stopped, resumes, saves and evaluates over and over; memory and descriptors stay flat.

    nice -n 19 .venv/bin/python tests/faults/soak.py --minutes 60 --out soak.json

Every cycle is the same run from its beginning, so it must end with the same weights. What the process holds is looked
at after each cycle. The first quarter does not count: allocators and caches fill. Of the rest, the median of all
slopes between two cycles tells how much the memory grows in an hour.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

TESTS = Path(__file__).resolve().parents[1]
MOST_GROWTH = 0.02
"""Share of the memory by which it may grow in an hour: the allocator's noise is smaller, and a leak of one model or
batch a cycle is far larger."""
LISTED = 120
"""Cycles in the JSON, evenly spread."""


@dataclass(frozen=True)
class Sample:
    """What the process holds after a cycle."""

    minutes: float
    resident_mib: float
    descriptors: int
    threads: int


def take_sample(began: float) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        minutes=round((time.monotonic() - began) / 60, 3),
        resident_mib=round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
    )


def slope_per_hour(samples: list[Sample]) -> float:
    """Return the median slope of the memory between any two samples (Theil and Sen), MiB an hour."""
    slopes = [
        60 * (late.resident_mib - early.resident_mib) / (late.minutes - early.minutes)
        for index, early in enumerate(samples)
        for late in samples[index + 1 :]
        if late.minutes > early.minutes
    ]
    return median(slopes)


def judge(samples: list[Sample]) -> dict[str, float | bool]:
    """Tell whether memory, descriptors and threads stayed flat after the first quarter."""
    counted = samples[len(samples) // 4 :]
    half = len(counted) // 2
    slope, memory = slope_per_hour(counted), median(one.resident_mib for one in counted)
    more = {
        name: max(getattr(one, name) for one in counted[half:]) - max(getattr(one, name) for one in counted[:half])
        for name in ("descriptors", "threads")
    }
    return {
        "memory_mib": memory,
        "growth_mib_per_hour": round(slope, 3),
        "growth_share_per_hour": round(slope / memory, 5),
        **{f"more_{name}": number for name, number in more.items()},
        "is_flat": slope < MOST_GROWTH * memory and not any(number > 0 for number in more.values()),
    }


def cycle(tokens: Path, folder: Path, text: str, number: int) -> bytes:
    """Train until a stop, resume to the end, and read what came of it; return the weights."""
    from training_runs import small_config, weights

    from metatokens import pretrain
    from metatokens.data.tokenizer import load_text_tokenizer
    from metatokens.errors import Preempted
    from metatokens.evaluation.perplexity import measure_perplexity
    from metatokens.training.loading import open_model

    out = folder / "run"
    background = ("--checkpoint.background", "true" if number % 2 else "false")
    config = small_config(folder / "small.yaml", tokens, *background)
    for stop_after in (0.4, None):
        try:
            pretrain(config, out, show_progress=False, stop_after=stop_after)
        except Preempted:
            assert (out / "preempted.json").is_file()
    assert (out / "result.json").is_file()
    model, tokenizer = open_model(out), load_text_tokenizer(str(out))
    assert measure_perplexity(model, [text], tokenizer).perplexity.estimate > 1
    found = weights(out)
    shutil.rmtree(out)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from campaign import revision
    from small_corpus import prepare_corpus

    from metatokens.training.run_folder import versions

    began_at, began, samples, expected = revision(), time.monotonic(), [], b""
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder = Path(place)
        tokens = prepare_corpus(folder, num_documents=40, vocab_size=300)
        text = (folder / "text" / "0.txt").read_text()
        while not samples or samples[-1].minutes < options.minutes:
            found = cycle(tokens, folder, text, len(samples))
            assert found == (expected or found), f"cycle {len(samples)} ended with other weights"
            expected = found
            samples.append(take_sample(began))
            if options.out is not None and (len(samples) % 10 == 8 or samples[-1].minutes >= options.minutes):
                document = {
                    "command": f"python tests/faults/soak.py --minutes {options.minutes:g}",
                    "versions": versions(),
                    "revision": began_at,
                    "minutes": samples[-1].minutes,
                    "cycles": len(samples),
                    **judge(samples),
                    "samples": [asdict(one) for one in samples[:: max(1, len(samples) // LISTED)]],
                }
                options.out.write_text(json.dumps(document, indent=1) + "\n")
    verdict = judge(samples)
    sys.stdout.write(f"{len(samples)} cycles, {samples[-1].minutes} minutes: {verdict}\n")
    return int(not verdict["is_flat"])


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "integration"), str(TESTS)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
