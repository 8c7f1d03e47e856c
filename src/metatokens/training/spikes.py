"""Judging a step by its numbers: one without finite numbers changes nothing, and a loss far above others is a spike.

A run warns of a spike and, if it is asked to, does not learn from it. Every finite loss is remembered, a spike too. So
where the loss stays at a new height, as at a new stage of a curriculum, it is no spike after a few steps. The memory is
part of a checkpoint, so a resumed run judges alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 128
"""Losses that a new one is compared with; before there are as many, none is a spike."""
SIGMAS = 6.0
"""Standard deviations above their mean from which on it is one."""
LEAST_RISE = 0.1
"""Nats by which it rises at least: losses that hardly differ would make the last bit of one a spike, and where a task
is all but solved, each mistake would be one."""


@dataclass(frozen=True)
class JudgedStep:
    """The numbers of an optimizer step, over all processes, and what follows from them."""

    loss: float
    """Mean over the targets, nats."""
    grad_norm: float
    limit: float = math.inf
    """From `spike_limit`."""
    skips_spikes: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_spike(self) -> bool:
        """Whether the loss is finite and far above those before it."""
        return self.is_finite and self.loss > self.limit

    @property
    def is_skipped(self) -> bool:
        """Whether the step must change nothing."""
        return not self.is_finite or (self.is_spike and self.skips_spikes)

    @property
    def is_unusual(self) -> bool:
        """Whether the step is put on record."""
        return not self.is_finite or self.is_spike

    def remembered(self, losses: Sequence[float]) -> list[float]:
        """Return the last losses with this one, if it is finite."""
        return [*losses, self.loss][-WINDOW:] if self.is_finite else list(losses)

    def record(self) -> dict[str, Any]:
        """Return the entries of a record, with None for a number that is not finite."""
        numbers = {"loss": self.loss, "grad_norm": self.grad_norm}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"reason": "spike" if self.is_spike else "not finite", "skipped": self.is_skipped, **finite}

    def __str__(self) -> str:
        """Say what is unusual about the step."""
        if not self.is_finite:
            return "changes nothing: its loss or its gradient is not finite"
        verb = "changes nothing" if self.is_skipped else "is learnt from"
        return f"{verb}: its loss {self.loss:.4g} is a spike, limit {self.limit:.4g}"


def spike_limit(losses: Sequence[float]) -> float:
    """Return the loss above which the next one is a spike; infinity while too few are remembered.

    Args:
        losses: from `JudgedStep.remembered`.
    """
    if len(losses) < WINDOW:
        return math.inf
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)
    return mean + max(SIGMAS * math.sqrt(variance), LEAST_RISE)
