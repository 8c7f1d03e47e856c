"""A grafted model in training: its loss is a sum of objectives, and what it saves is the graft alone.

The teacher of distillation is the same weights with the graft switched off, so no second model is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metatokens.config.grafting import Objectives
from metatokens.graft.grafting import enable_gradient_checkpointing, graft_of, switched_off
from metatokens.graft.objectives import OBJECTIVES, Pass
from metatokens.graft.saving import write_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator


class Outcome(NamedTuple):
    """What came of a pass."""

    loss: Tensor
    """The weighted sum of the objectives over `num_items_in_batch`, a scalar in nats."""
    parts: dict[str, Tensor]
    """Each objective's sum over the positions, without its weight, by name."""


class Student(nn.Module):
    """A grafted model under the call of the training loop.

    Attributes:
        wrapped: a model of transformers, grafted; its own weights are frozen.
        config: of the model.
    """

    def __init__(self, model: Any, objectives: Objectives, base: Mapping[str, str]) -> None:
        """Wrap a grafted model.

        Args:
            model: the model.
            objectives: their weights.
            base: what an adapter says of it, from `metatokens.graft.saving.describe_base`.
        """
        super().__init__()
        self.wrapped, self.config, self._base = model, model.config, base
        self._weights = {name: weight for name, weight in objectives.model_dump().items() if weight}

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        sampled: Tensor,
        answers: Tensor | None = None,
        *,
        num_items_in_batch: int | Tensor = 1,
        use_cache: bool = False,
    ) -> Outcome:
        """Return the loss of a micro-batch; in evaluation mode also the parts that have no weight.

        Args:
            input_ids: (B, T) text.
            shift_labels: (B, T) the token that follows each.
            sampled: (B, P) positions at which predictions are compared with the teacher's.
            answers: (B, T) those of `shift_labels` that answer a question, -100 elsewhere.
            num_items_in_batch: divisor of the sums.
            use_cache: has no effect; the training loop says that it wants none.
        """
        del use_cache
        wanted = self._weights if self.training else OBJECTIVES
        names = [name for name in wanted if answers is not None or not OBJECTIVES[name].needs_answers]
        teacher_states = None
        if any(OBJECTIVES[name].needs_teacher for name in names):
            with torch.no_grad(), switched_off(self.wrapped), _evaluating(self.wrapped):
                states = self._states(input_ids)
            teacher_states = torch.take_along_dim(states, sampled[..., None], dim=1)
            del states
        state = Pass(
            states=self._states(input_ids),
            targets=shift_labels,
            sampled=sampled,
            teacher_states=teacher_states,
            head=self.wrapped.get_output_embeddings(),
            answers=answers,
        )
        parts = {name: OBJECTIVES[name].compute(state) for name in names}
        total = torch.stack([self._weights.get(name, 0.0) * part for name, part in parts.items()]).sum()
        return Outcome(total / num_items_in_batch, parts)

    def _states(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.wrapped.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    @property
    def generation_config(self) -> Any:
        """Return that of the model."""
        return self.wrapped.generation_config

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        return {}  # of the graft, which is all that is stored

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass."""
        enable_gradient_checkpointing(self.wrapped)

    def num_parameters(self) -> int:
        """Return the number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override] # torch overloads it
        """Return the tensors of the graft under the names that they have in its file."""
        tensors: dict[str, Any] = graft_of(self.wrapped).state_dict(*args, **options)
        return tensors

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter and the base's config into a folder, which may be there; `load_graft` reads it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        added = graft_of(self.wrapped)
        write_adapter(folder, added.state_dict() if state_dict is None else state_dict, added.config, self._base)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without its dropout, for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
