"""Work in a process of its own, whose peak is that of the work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from metatokens.errors import UsageError

# glibc would keep freed tensors for later ones, and their fragments would count as memory in use
EXACT_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def run_apart(function: Callable[..., Mapping[str, float]], *arguments: Any) -> Mapping[str, float]:
    """Return what a function of a module gives in a new process; JSON must hold its arguments."""
    script = (
        f"import json, sys; from {function.__module__} import {function.__name__} as run; "
        "print(json.dumps(run(*json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | EXACT_ALLOCATION,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bytes_of_process(device: str, field: str) -> float:
    """Return VmHWM, the peak, or VmRSS, what is resident now; on a GPU what torch has allocated there."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        # ru_maxrss elsewhere holds what the parent had at its peak
        raise UsageError(
            "the peak of a process", expected="Linux or --device cuda", found=sys.platform, remedy="run it there"
        )
    (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field)]
    return 1024 * float(line.split()[1])
