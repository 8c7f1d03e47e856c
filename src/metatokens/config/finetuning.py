"""The configuration of a fine-tuning run on a recall task, and of its evaluation (paper section 3).

A curriculum is data: stages one after another, each with its steps and its difficulty.
"""

import os.path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from metatokens.config.attention import MemoryAttention
from metatokens.config.base import UserPath
from metatokens.config.schema import Frozen, ModelConfig, RunConfig, check_schedule
from metatokens.config.tasks import CopyingTask, Difficulty, Range, Task, check_bin


class FreshStart(Frozen):
    """Begin with a new model and the tokenizer of its vocabulary."""

    kind: Literal["fresh"] = "fresh"
    model: ModelConfig = ModelConfig()
    tokenizer: UserPath | None = None
    """Folder or file of a tokenizer; off means a tokenizer trained on the words of the tasks."""


class CheckpointStart(Frozen):
    """Begin with the weights and the tokenizer of a trained model."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Annotated[str, AfterValidator(os.path.expanduser)]
    """A run folder, a model folder, or the id of a causal language model on the Hugging Face hub."""
    memory: MemoryAttention | None = None
    """Put a model of this package into memory mode, which has no weights of its own; off means as it was trained."""


Start = Annotated[FreshStart | CheckpointStart, Field(discriminator="kind")]


class Stage(Difficulty):
    """One phase of the curriculum."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    @property
    def difficulty(self) -> Difficulty:
        """The difficulty alone, since the number of steps does not change the instances."""
        return Difficulty(size=self.size, prompt_tokens=self.prompt_tokens)


class RecallEvaluationConfig(Frozen):
    """Accuracy on test instances during training."""

    interval_steps: int | None = Field(500, ge=1)
    """Optimizer steps between evaluations; off means never."""
    instances: int = Field(200, ge=1)
    """Test instances of one evaluation, at the difficulty of the last stage."""


class SolveConfig(Frozen):
    """The end of a training that stops once its task is solved, so that its result is a time and not an accuracy.

    These evaluations take the place of those in `evaluation`. A training that reaches the last step of its curriculum
    without solving the task is censored there.
    """

    accuracy: float = Field(0.95, gt=0, le=1)
    """Share of whole answers that must be right."""
    evaluations: int = Field(2, ge=1)
    """Consecutive evaluations that must reach it."""
    interval_steps: int = Field(25, ge=1)
    """Optimizer steps between evaluations."""
    instances: int = Field(200, ge=1)
    """Test instances of each evaluation, always the same, at the difficulty of the last stage."""


class TestConfig(Frozen):
    """The lengths and the number of instances that a trained model is tested on."""

    lengths: tuple[Annotated[str, AfterValidator(check_bin)], ...] = Field(("easy", "medium", "hard"), min_length=1)
    """Length bins by name (easy, medium, hard, extra-hard, long) or ranges of prompt tokens as 2049-4096."""
    instances: int = Field(500, ge=1)
    """Test instances of each row."""
    extrapolate: bool = False
    """Test lengths beyond the model's window too, if its positions have no end (all but learned ones, those drawn
    from a range and dynamic scaling of rope). Otherwise the row of such a length reads n/a."""


class FinetuneConfig(RunConfig):
    """A fine-tuning run on one recall task."""

    start: Start = FreshStart()
    task: Task = CopyingTask()
    curriculum: tuple[Stage, ...] = Field(
        (
            Stage(steps=2_000, size=(2, 4), prompt_tokens=(1, 128)),
            Stage(steps=2_000, size=(2, 8), prompt_tokens=(1, 256)),
            Stage(steps=2_000, size=(4, 16), prompt_tokens=(1, 512)),
            Stage(steps=2_000, size=(4, 24), prompt_tokens=(1, 1_024)),
            Stage(steps=2_000, size=(4, 32), prompt_tokens=(1, 2_048)),
        ),
        min_length=1,
    )
    """The stages, in order (paper section 3: five phases of growing lists and prompts; the numbers are ours)."""
    train_instances: int | None = Field(90_000, ge=1)
    """Number of different training instances, divided among the stages by their steps (paper section 3); off means that
    no instance comes twice."""
    bucket_batches: int = Field(8, ge=1)
    """Number of batches that are drawn together and then cut by length, so that the rows of a batch are about equally
    long."""
    evaluation: RecallEvaluationConfig = RecallEvaluationConfig()
    solve: SolveConfig | None = None
    """Stop once the task is solved; off means that every step of the curriculum is done."""
    test: TestConfig = TestConfig()
    """Defaults of `metatokens evaluate` for the trained model; the training does not use them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_schedule(self.schedule, self.total_steps, "curriculum")
        if self.train_instances is not None and self.train_instances < len(self.curriculum):
            raise ValueError(f"train_instances {self.train_instances} is less than the number of stages of curriculum")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps for stage in self.curriculum)


class EvaluateConfig(TestConfig):
    """An evaluation of a model: the task, its size and its lengths."""

    task: Task = CopyingTask()
    size: Range = (4, 4)
    """Bounds of the task's own size, as in a stage of a curriculum."""
    batch_size: int = Field(32, ge=1)
    """Instances of one forward pass."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the test instances and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
