"""Do several devices train as one does, and how fast, in how much memory? One call checks and measures.

    metatokens prepare python-docs --out tokens
    torchrun --nproc-per-node 8 benchmarks/scale_out.py small/meta --tokens tokens --out scale_out.json

Trains a few steps of the preset under DDP and under FSDP2, in float32 and bfloat16, and then continues each from the
other's checkpoint. The losses must agree within rounding. Speed is that of the steps after the first few; memory is
the peak of the process that has most. It needs two processes at least, on the CPU (gloo) or on GPUs (NCCL).
"""

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metatokens import load_preset, pretrain
from metatokens.training.checkpoint import step_folders

KINDS = ("ddp", "fsdp2")
# losses of some steps drift apart by the rounding of each; eight bits of mantissa leave that much of a loss
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-8}
MIB = 2**20


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    assert one.keys() == other.keys(), "other steps"
    return max(abs(one[step] - other[step]) / one[step] for step in one)


def peak_mib() -> float:
    """Return the peak memory of this process since the last call, on its GPU, or of all its life on the CPU."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / MIB
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(options: argparse.Namespace, out: Path, kind: str, precision: str) -> dict[str, Any]:
    half = options.steps // 2
    overrides = ["--data.path", str(options.tokens), "--schedule.kind", "cosine", "--schedule.warmup_steps", "1"]
    overrides += ["--training.duration.kind", "steps", "--training.duration.steps", str(options.steps)]
    overrides += ["--evaluation.interval_steps", "off", "--logging.interval_steps", "1"]
    overrides += ["--training.parallel.kind", kind, "--training.precision", precision]
    overrides += ["--checkpoint.interval_steps", str(half), "--checkpoint.keep", "9", *options.overrides]
    result = pretrain(load_preset(options.preset, overrides), out, show_progress=False)
    (out / f"peak-{os.environ['RANK']}").write_text(str(peak_mib()))
    return {"text_tokens_per_second": result.text_tokens_per_second, "parameters": result.num_parameters}


def continue_as(options: argparse.Namespace, source: Path, kind: str, precision: str) -> Path:
    """Continue a run from the middle, as another kind; returns the folder, a copy."""
    out = source.with_name(f"{source.name}-as-{kind}")
    if os.environ["RANK"] == "0":
        shutil.copytree(source, out)
        shutil.rmtree(out / "model")
        shutil.rmtree(step_folders(out / "checkpoints")[0])
        (out / "metrics.jsonl").unlink()
    train(options, out, kind, precision)
    return out


def measure(options: argparse.Namespace, folder: Path, precision: str) -> dict[str, Any]:
    runs = {kind: train(options, folder / f"{kind}-{precision}", kind, precision) for kind in KINDS}
    whole = {kind: losses(folder / f"{kind}-{precision}") for kind in KINDS}
    differences = {"ddp to fsdp2, from the start": largest_difference(*whole.values())}
    for kind, other in (KINDS, KINDS[::-1]):
        continued = losses(continue_as(options, folder / f"{kind}-{precision}", other, precision))
        reference = {step: loss for step, loss in whole[kind].items() if step in continued}
        differences[f"{kind} continued as {other}"] = largest_difference(reference, continued)
    for kind, run in runs.items():
        peaks = (folder / f"{kind}-{precision}").glob("peak-*")
        run["peak_mib_of_a_process"] = max(float(path.read_text()) for path in peaks)
    agrees = max(differences.values()) <= TOLERANCE[precision]
    return {"runs": runs, "relative_differences_of_losses": differences, "agrees": agrees}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("preset")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for the runs, on a disk that all processes see")
    options, options.overrides = parser.parse_known_args()
    is_main = os.environ["RANK"] == "0"
    folder = options.folder or Path(tempfile.gettempdir()) / f"scale-out-{os.environ['MASTER_PORT']}"
    document = {
        "command": f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} benchmarks/scale_out.py {options.preset}",
        "processes": int(os.environ["WORLD_SIZE"]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "backend": "nccl" if dist.is_nccl_available() and torch.cuda.is_available() else "gloo",
        "torch": torch.__version__,
    }
    document |= {precision: measure(options, folder, precision) for precision in TOLERANCE}
    if is_main:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
        print(json.dumps(document, indent=2))
    return 0 if all(document[precision]["agrees"] for precision in TOLERANCE) else 1


if __name__ == "__main__":
    raise SystemExit(main())
