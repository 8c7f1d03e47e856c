"""What an objective is: a function from a pass of the grafted model to a sum of nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Pass:
    """What a micro-batch of B blocks of T text tokens came to."""

    states: Tensor
    """(B, T, C) last hidden states of the grafted model."""
    targets: Tensor
    """(B, T) int64, the next token of each position."""
    sampled: Tensor
    """(B, P) int64, the drawn positions of each block."""
    teacher_states: Tensor | None
    """(B, P, C) states at the drawn positions of the same model under full attention, without gradients; None unless an
    objective asks for them."""
    head: nn.Module
    """Maps states to logits."""
    answers: Tensor | None = None
    """(B, T) int64, the targets that are answers, -100 elsewhere; None where no block asks."""

    @property
    def vocab_size(self) -> int:
        """V, for the size of a chunk of logits."""
        weight: Any = self.head.weight
        return int(weight.shape[0])


@dataclass(frozen=True)
class Objective:
    """A registered objective."""

    compute: Callable[[Pass], Tensor]
    """Returns the sum over all B x T positions, in nats, or an estimate of it from the drawn ones."""
    needs_teacher: bool
    """Whether it reads `teacher_states`, which cost a forward pass."""
    needs_answers: bool
    """Whether it reads `answers`, without which it is left out."""


OBJECTIVES: dict[str, Objective] = {}
"""By name."""


def objective(
    *, needs_teacher: bool = False, needs_answers: bool = False
) -> Callable[[Callable[[Pass], Tensor]], Callable[[Pass], Tensor]]:
    """Register the decorated function as an objective, under its name."""

    def register(compute: Callable[[Pass], Tensor]) -> Callable[[Pass], Tensor]:
        OBJECTIVES[compute.__name__] = Objective(compute, needs_teacher, needs_answers)
        return compute

    return register
