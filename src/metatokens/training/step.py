"""The optimizer step: from a batch to changed weights, or to nothing if a number is not finite.

A step counts the valid targets of all its micro-batches and processes and divides every micro-batch's summed loss by
that count. It changes nothing if the loss or gradient is not finite, or the loss a spike that the config skips.
Learning rate and dropout are functions of the step, so a step does not depend on the ones that this process did before.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metatokens.config.schema import RunConfig
from metatokens.data.keyed_random import Purpose, hash_key
from metatokens.data.loader import Batch
from metatokens.training.distributed import Processes
from metatokens.training.optimizer import learning_rate_at
from metatokens.training.parallel import Whole, whole_tensor
from metatokens.training.spikes import JudgedStep


class OptimizerStep:
    """Takes one step after another on a model that the processes share."""

    def __init__(
        self, config: RunConfig, model: Any, optimizer: torch.optim.Optimizer, processes: Processes, shared: Whole
    ) -> None:
        """Wrap the model for training; nothing is run yet."""
        self._config, self._model, self._optimizer = config, model, optimizer
        self._processes, self._shared = processes, shared
        wrapped = shared.wrap(model)
        self._step_model = torch.compile(wrapped) if config.training.compile else wrapped
        self._draws = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()) or bool(
            getattr(model.config, "attention_dropout", 0) or getattr(model.config, "position_range", None)
        )

    def take(self, step: int, batch: Batch, num_targets: float, limit: float = math.inf) -> JudgedStep:
        """Do step number `step` and return its mean loss and its gradient norm over all processes.

        Weights and moments stay as they are, on all processes, if the step is to be skipped.

        Args:
            step: counted from 0.
            batch: this process's rows.
            num_targets: of the batches of all processes together.
            limit: the loss above which it is a spike, nats per target.
        """
        device, world_size = self._processes.device, self._processes.world_size
        rows = min(self._config.training.micro_batch_blocks, batch.num_rows)
        micro_batches = [batch.to_model_inputs(slice(i, i + rows), device) for i in range(0, batch.num_rows, rows)]
        self._seed_draws(step)
        total = torch.zeros((), device=device)
        for index, inputs in enumerate(micro_batches):
            with self._shared.accumulate(self._step_model, last=index + 1 == len(micro_batches)):
                # gradients are averaged over processes, so the sum is divided by the targets of an average process
                part = self._forward(inputs, num_targets / world_size)
                part.backward()
            total += part.detach() / world_size
        clip = self._config.optimizer.gradient_clip or float("inf")
        grad_norm = float(whole_tensor(nn.utils.clip_grad_norm_(self._model.parameters(), clip)))
        loss = self._processes.sum(float(total))[0]
        judged = JudgedStep(loss, grad_norm, limit, self._config.training.skip_spikes)
        # every process decides the same, because gradients are averaged and the loss is summed over processes
        if not judged.is_skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return judged

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self._config
        return learning_rate_at(
            step, total_steps=config.total_steps, peak=config.optimizer.learning_rate, schedule=config.schedule
        )

    def settle_buckets(self, make_batch: Callable[[], Batch]) -> None:
        """Run one backward pass for DDP and drop its gradients.

        After its first backward pass DDP regroups the gradients, which changes the order in which three or more
        processes add them up. If it regroups before the first step, a resumed run equals an uninterrupted one to the
        bit.
        """
        if not self._shared.regroups_gradients:
            return
        rows = slice(0, self._config.training.micro_batch_blocks)
        self._forward(make_batch().to_model_inputs(rows, self._processes.device), 1.0).backward()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(self, inputs: dict[str, Tensor], num_targets: float) -> Tensor:
        # filled on the device, so nothing waits for a copy; a number would be a constant of a compiled graph
        divisor = torch.full((), num_targets, dtype=torch.float32, device=self._processes.device)
        bfloat16 = self._config.training.precision == "bfloat16"
        with torch.autocast(self._processes.device.type, torch.bfloat16, enabled=bfloat16):
            loss: Tensor = self._step_model(**inputs, use_cache=False, num_items_in_batch=divisor).loss
        return loss

    def _seed_draws(self, step: int) -> None:
        """Seed dropout and randomised positions by step and process, so that a resumed run draws the same."""
        if self._draws:
            key = hash_key(self._config.seed, step, self._processes.rank, Purpose.DROPOUT)
            torch.manual_seed(int(key[0] >> 1))
