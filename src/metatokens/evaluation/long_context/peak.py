"""The peak of memory during a piece of work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to what is resident now


class Peak:
    """What a block of `peak_memory` found."""

    num_bytes: int | None = None
    """The largest memory in use within the block, weights included: of the GPU if there is one, else resident memory of
    the process; None where the system does not tell."""


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of a block; its number is set when the block ends."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    can_reset = True
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        can_reset = False
    yield peak
    if can_reset:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                peak.num_bytes = int(line.split()[1]) * 1024
