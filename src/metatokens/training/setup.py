"""The setup of a training: its model, batches and evaluation; `pretraining.py` and `finetuning.py` make it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.config.finetuning import SolveConfig
from metatokens.data.loader import Batch, Batches
from metatokens.model.accounting import training_flops
from metatokens.training.model_card import Training


@dataclass(frozen=True)
class TrainingSetup:
    """The model, the batches and the evaluation of a run."""

    model: Any
    """In training mode, with the weights that the run starts from; not yet on a device."""
    tokenizer: Any
    """Saved with every checkpoint."""
    content_id: str
    """Identity of the data, and of the initial weights unless they are new; a run never continues on others."""
    made: Training
    """For the model card: the verb, what it reads and what it starts from."""
    batches: Batches
    count_flops: Callable[[Batch], int]
    """Returns the floating-point operations of the forward and backward pass over a batch."""
    evaluate: Callable[[], Mapping[str, tuple[float, float]]] | None = None
    """Returns the sum and the count of each mean over this process's share; called by every process, without
    gradients, with the model in evaluation mode. It must not wait for another process. None means no evaluation."""
    evaluation_steps: int | None = None
    """Optimizer steps between evaluations; one more after the last step."""
    solve: SolveConfig | None = None
    """Ends the run once the sequence accuracy of `evaluate` has been high enough; None means after the last step."""


def count_batch_flops(model: Any, batch: Batch) -> int:
    """Count the operations of a training step over a batch, including those spent on padding."""
    count = model.training_flops if isinstance(model, PretrainedCausalLM) else partial(training_flops, model.config)
    num_positions = batch.input_ids.shape[1]
    num_meta = round(batch.num_meta / batch.num_rows)
    num_logits = round(batch.num_targets / batch.num_rows)
    flops: int = count(num_positions=num_positions, num_meta=num_meta, num_logits=num_logits)
    return batch.num_rows * flops
