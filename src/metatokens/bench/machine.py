"""The machine: what it is, and how fast it multiplies matrices and copies memory at best.

The rates are measured in the rounds of the contenders and are what their times are compared with.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metatokens.bench.turns import Turn, timed

PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "tiktoken", "x-transformers")
MATRIX, COPY, READ = "matrix product", "copy", "read"


@dataclass(frozen=True)
class _Sizes:
    """Work of one turn: large enough to reach the full rate, small beside the contenders."""

    matrix: int
    """Rows and columns of both factors."""
    copied_bytes: int
    """Beyond any cache."""
    repeats: int


_SIZES = {"cpu": _Sizes(1024, 2**27, 2), "cuda": _Sizes(8192, 2**30, 20)}


def describe_machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on, and how busy the machine was when asked."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def make_rates_turn(device: str, precision: str) -> tuple[Turn, dict[str, float]]:
    """Return a turn that times the machine's rates, and what each part of it does: operations, or bytes moved.

    A copy counts the bytes that it reads and those that it writes. Reading is a product of a matrix and a vector, as in
    a decoding step.
    """
    sizes = _SIZES[device]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    one, other = draw(sizes.matrix, sizes.matrix), draw(sizes.matrix, sizes.matrix)
    width = 8192
    source = draw(sizes.copied_bytes // dtype.itemsize // width, width)
    target, vector = torch.empty_like(source), draw(width)
    work = {
        MATRIX: lambda: one @ other,
        COPY: lambda: target.copy_(source),
        READ: lambda: source @ vector,
    }

    def turn() -> Mapping[str, float]:
        # the best of two: a limit is what the machine can do
        return {
            name: min(timed(lambda run=run: [run() for _ in range(sizes.repeats)]) for _ in range(2))  # type: ignore[misc]
            for name, run in work.items()
        }

    done = {MATRIX: 2.0 * sizes.matrix**3, COPY: 2.0 * sizes.copied_bytes, READ: 1.0 * sizes.copied_bytes}
    return turn, {name: amount * sizes.repeats for name, amount in done.items()}
