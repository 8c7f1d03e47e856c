"""The configuration of a run: one frozen tree, validated before anything else happens.

A preset (YAML) holds only what differs from these defaults; the resolved tree is written to the run folder
and is itself a valid preset. A choice between variants is a union with a `kind`, never a bundle of flags.
The attribute docstrings are the documentation of the fields, here and in `metatokens pretrain --help`.

Defaults are those of the paper (section 4.1 and appendix A) unless a field says otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from metatokens.config.attention import (
    Attention,
    BlockRecurrentAttention,
    FullAttention,
    LandmarkAttention,
    MemoryAttention,
    SparseAttention,
    attention_from_hf,
)
from metatokens.config.base import Frozen as Frozen  # noqa: PLC0414 - users import the whole schema from here
from metatokens.config.base import UserPath
from metatokens.config.injection import ExplicitInjection as ExplicitInjection  # noqa: PLC0414
from metatokens.config.injection import Injection as Injection  # noqa: PLC0414
from metatokens.config.injection import NoInjection as NoInjection  # noqa: PLC0414
from metatokens.config.injection import PeriodicInjection as PeriodicInjection  # noqa: PLC0414
from metatokens.config.injection import PunctuationInjection as PunctuationInjection  # noqa: PLC0414
from metatokens.config.injection import ThoughtInjection as ThoughtInjection  # noqa: PLC0414
from metatokens.config.injection import UniformInjection as UniformInjection  # noqa: PLC0414
from metatokens.config.parallel import Ddp, Parallel
from metatokens.config.rope import DynamicScaling as DynamicScaling  # noqa: PLC0414
from metatokens.config.rope import LinearScaling as LinearScaling  # noqa: PLC0414
from metatokens.config.rope import NoScaling as NoScaling  # noqa: PLC0414
from metatokens.config.rope import RopeScaling as RopeScaling  # noqa: PLC0414
from metatokens.config.rope import YarnScaling as YarnScaling  # noqa: PLC0414

VOCABULARY_MULTIPLE = 64  # rows of the embedding are padded to this, for the speed of matrix products


LossPolicy = Literal["skip", "retarget"]

# Model -------------------------------------------------------------------------------------------------------


class ModelConfig(Frozen):
    """Shape of the model; fields have the names that transformers gives them, if it has them."""

    hidden_size: int = Field(768, ge=1)
    """C: width of the residual stream."""
    num_hidden_layers: int = Field(12, ge=1)
    """Number of transformer blocks."""
    num_attention_heads: int = Field(12, ge=1)
    """H: heads of both attentions."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width inside the MLP; off means 4 x hidden_size."""
    max_position_embeddings: int = Field(1024, ge=1)
    """The longest sequence, meta-tokens included."""
    hidden_act: str = "gelu_pytorch_tanh"
    """Activation of the MLP, by its transformers name."""
    layer_norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in every LayerNorm."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on attention weights."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the embedding and on the output of each sub-layer."""
    position_encoding: Literal[
        "rope",
        "xpos",
        "fourier",
        "learned",
        "alibi",
        "t5",
        "kerple",
        "dape_alibi",
        "dape_kerple",
        "transformer_xl",
        "none",
    ] = "rope"
    """How positions enter both attentions. xpos: RoPE with scores that decay with the distance; fourier: RoPE with
    mixed frequencies; t5: a learned bias by distance; kerple: minus a logarithm of the distance; dape: a map of the
    scores and that bias; transformer_xl: relative keys."""
    position_layers: Literal["all", "even"] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Which blocks have positions: "all", "even" (every second one, the first included) or a list of indices; only with
    rope, xpos and fourier. Both attentions of the others are without."""
    position_range: int | None = Field(None, ge=2)
    """N: randomised positions, in training drawn out of N for each row in order, and otherwise evenly spread over them;
    more than max_position_embeddings, the longest text. Off means that positions count the tokens."""
    rope_theta: float = Field(10_000.0, gt=0)
    """RoPE base."""
    rope_scaling: RopeScaling = NoScaling()
    """Context extension of RoPE."""
    attention: Attention = FullAttention()
    """What the causal self-attention sees."""
    meta_attention_layers: Literal["all", "none"] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Which blocks have meta-attention: "all", "none" or a list of indices."""
    meta_attention_over: Literal["meta", "all", "random", "cross", "gather"] = "meta"
    """The members of meta-attention. meta: the meta-tokens; all: every token, at full cost (double attention); random:
    pseudo-random text tokens in place of the meta-tokens. Or who reads whom. cross: meta-tokens the text before them,
    and text the meta-tokens before it; gather: the first of these alone."""
    random_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the text tokens that are members if meta_attention_over is random."""
    thought_length: int | None = Field(None, ge=1)
    """n: of every n + 2 meta-tokens the first and the last, start and end of a thought, have vectors of their own added
    to their embedding; off means that all meta-tokens are alike."""
    loss_policy: LossPolicy = "skip"
    """skip: drop the loss term whose target is a meta-token; retarget: predict the next text token from the
    last text token and use no output at a meta-token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads "
                f"{self.num_attention_heads}"
            )
        self._check_positions()
        if self.meta_attention_over != "meta" and self.meta_attention_layers == "none":
            raise ValueError(
                f"model.meta_attention_over {self.meta_attention_over} needs model.meta_attention_layers, not none"
            )
        has_meta_attention = self.meta_attention_layers not in ("none", ())
        if self.thought_length is not None and not (
            self.meta_attention_over in ("meta", "cross", "gather") and has_meta_attention
        ):
            raise ValueError(
                "model.thought_length needs meta-attention over meta, cross or gather, whose cache counts meta-tokens"
            )
        if isinstance(self.attention, MemoryAttention):
            self._check_memory(self.attention)
        if isinstance(self.attention, SparseAttention):
            beyond = [i for i in self.attention.layers if isinstance(i, int) and i >= self.num_hidden_layers]
            if beyond:
                raise ValueError(f"model.attention.layers {beyond} are beyond the {self.num_hidden_layers} layers")
        if isinstance(self.attention, BlockRecurrentAttention):
            self._check_recurrence(self.attention)
        for name in ("meta_attention_layers", "position_layers"):
            outside = [i for i in getattr(self, name) if isinstance(i, int) and i >= self.num_hidden_layers]
            if outside:
                raise ValueError(f"model.{name} {outside} are beyond the {self.num_hidden_layers} layers")
        return self

    def _check_recurrence(self, attention: BlockRecurrentAttention) -> None:
        if attention.recurrent_layer >= self.num_hidden_layers:
            raise ValueError(
                f"model.attention.recurrent_layer {attention.recurrent_layer} is beyond the {self.num_hidden_layers} "
                "layers"
            )
        if attention.window >= self.max_sequence_length:
            raise ValueError(
                f"model.attention.window {attention.window} must be less than model.max_position_embeddings "
                f"{self.max_sequence_length}, or no token would read the state"
            )

    def _check_positions(self) -> None:
        encoding = self.position_encoding
        if self.has_rotation and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"model.position_encoding {encoding} needs an even head size (hidden_size / num_attention_heads)"
            )
        if encoding == "transformer_xl" and self.hidden_size % 2:
            raise ValueError(f"model.position_encoding {encoding} needs an even model.hidden_size")
        if encoding.startswith("dape") and not isinstance(self.attention, FullAttention):
            raise ValueError(
                f"model.position_encoding {encoding} needs model.attention full, not {self.attention.kind}"
            )
        if encoding != "rope" and self.rope_scaling.kind != "none":
            raise ValueError("model.rope_scaling needs model.position_encoding rope")
        if self.position_range is not None:
            self._check_position_range(self.position_range)
        if self.position_layers != "all" and not self.has_rotation:
            raise ValueError(
                f"model.position_layers needs model.position_encoding rope, xpos or fourier, not {encoding}"
            )

    def _check_position_range(self, num_positions: int) -> None:
        if num_positions <= self.max_position_embeddings:
            raise ValueError(
                f"model.position_range {num_positions} must exceed model.max_position_embeddings "
                f"{self.max_position_embeddings}, the longest text"
            )
        if self.position_encoding == "none" or self.rope_scaling.kind != "none":
            raise ValueError("model.position_range needs a model.position_encoding, and model.rope_scaling none")
        if isinstance(self.attention, MemoryAttention):
            raise ValueError("model.attention memory does not take model.position_range")

    def _check_memory(self, memory: MemoryAttention) -> None:
        if self.thought_length is not None:
            raise ValueError("model.attention memory needs model.thought_length off: it counts what it keeps")
        has_meta_attention = self.meta_attention_layers != "none"
        if self.meta_attention_over != "meta" and has_meta_attention:
            raise ValueError(
                f"model.attention memory needs model.meta_attention_over meta, not {self.meta_attention_over}: the "
                "others are evicted"
            )
        if memory.memory_limit is not None and memory.layers != "all" and has_meta_attention:
            raise ValueError("model.attention.memory_limit with meta-attention needs model.attention.layers all")
        has_bias = self.position_encoding in ("alibi", "t5", "kerple")
        if memory.positions == "text" and memory.layers != "all" and has_bias:
            raise ValueError(
                f"model.attention.positions text under model.position_encoding {self.position_encoding} needs "
                "model.attention.layers all"
            )
        if memory.positions == "compact" and (self.position_encoding != "rope" or memory.layers != "all"):
            raise ValueError(
                "model.attention.positions compact needs model.position_encoding rope and model.attention.layers all"
            )
        if memory.positions == "compact" and self.position_layers != "all":
            raise ValueError("model.attention.positions compact needs model.position_layers all")

    @property
    def has_rotation(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.position_encoding in ("rope", "xpos", "fourier")

    @property
    def max_sequence_length(self) -> int:
        """The longest sequence: max_position_embeddings, which only dynamic scaling multiplies by its factor."""
        factor = self.rope_scaling.factor if isinstance(self.rope_scaling, DynamicScaling) else 1
        return int(self.max_position_embeddings * factor)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """Return the config that `to_hf` turned into `fields`; fields that this class does not have are ignored.

        Raises:
            ValidationError: there is no such config, for example for a RoPE scaling that this class lacks.
        """
        tree = {name: fields[name] for name in cls.model_fields if name in fields}
        tree["attention"] = attention_from_hf(fields)
        if tree.get("intermediate_size") == 4 * fields["hidden_size"]:
            tree["intermediate_size"] = None
        rope = dict(fields.get("rope_parameters") or {})
        if rope:
            tree["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
            tree["rope_scaling"] = {"kind": "none" if kind == "default" else kind, **rope}
        return cls.model_validate(tree)

    def to_hf(self, text_vocab_size: int, eos_token_id: int) -> dict[str, Any]:
        """Return the keyword arguments of the config class, `MetaTokenConfig` for full attention.

        `metatokens.baselines.building.build_config` chooses the class by the kind of attention.

        The meta-token is the first id after the text vocabulary and padding the next one, so text can never
        hold either; the embedding is padded to a multiple of 64 rows.
        """
        fields = self.model_dump(exclude={"rope_theta", "rope_scaling", "intermediate_size", "attention"})
        for name in ("meta_attention_layers", "position_layers"):
            fields[name] = list(fields[name]) if isinstance(fields[name], tuple) else fields[name]
        rope = {"rope_theta": self.rope_theta, **self.rope_scaling.to_hf()}
        return {
            **fields,
            **self.attention.to_hf(),
            "intermediate_size": self.intermediate_size or 4 * self.hidden_size,
            "rope_parameters": rope if self.has_rotation else None,
            "vocab_size": -(-(text_vocab_size + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            "meta_token_id": text_vocab_size,
            "pad_token_id": text_vocab_size + 1,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
        }


# Data and training -------------------------------------------------------------------------------------------


class DataConfig(Frozen):
    """Where the tokens come from and how they are cut."""

    path: UserPath | None = None
    """A folder made by `metatokens prepare`."""
    block_size: int = Field(1024, ge=2)
    """T: positions of a training sequence, text and meta-tokens together."""
    verify: Literal["full", "size"] = "full"
    """full: compare every shard's SHA-256 at the start; size: only its length."""


class ReconstructConfig(Frozen):
    """Training blocks that end with an earlier span of their text once more, which memory mode has evicted."""

    share: float = Field(0.5, gt=0, le=1)
    """Share of the blocks."""
    tokens: int = Field(32, ge=1)
    """Text tokens of a span."""
    distance: int = Field(64, ge=1)
    """Least text tokens between a span and its repetition; the window, so that the span is gone."""


class OptimizerConfig(Frozen):
    """AdamW."""

    learning_rate: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices; vectors (biases, norms) have none."""
    gradient_clip: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; off means no clipping."""


class CosineSchedule(Frozen):
    """Linear warm-up, then a half cosine to the floor."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(2_000, ge=0)
    """Optimizer steps of linear warm-up."""
    horizon_steps: int | None = Field(None, ge=1)
    """Step that reaches the floor; off means the last step (the paper planned 600,000 and ran 200,000)."""
    floor: float = Field(0.1, ge=0, le=1)
    """Lowest learning rate, as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.horizon_steps is not None and self.horizon_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule.horizon_steps {self.horizon_steps} is not beyond schedule.warmup_steps {self.warmup_steps}"
            )
        return self


class WsdSchedule(Frozen):
    """Warm-up, stable, linear decay to the floor at the last step."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(2_000, ge=0)
    """Optimizer steps of linear warm-up."""
    decay_steps: int = Field(20_000, ge=1)
    """Optimizer steps of the decay at the end."""
    floor: float = Field(0.0, ge=0, le=1)
    """Lowest learning rate, as a share of the peak."""


Schedule = Annotated[CosineSchedule | WsdSchedule, Field(discriminator="kind")]


def check_schedule(schedule: CosineSchedule | WsdSchedule, total_steps: int, length_key: str) -> None:
    """Raise ValueError if the phases of a schedule do not fit into the run, whose length `length_key` sets."""
    if isinstance(schedule, WsdSchedule) and schedule.warmup_steps + schedule.decay_steps > total_steps:
        raise ValueError(
            f"schedule.warmup_steps {schedule.warmup_steps} and schedule.decay_steps {schedule.decay_steps} exceed "
            f"the {total_steps} steps of {length_key}"
        )


class StepsDuration(Frozen):
    """A number of optimizer steps."""

    kind: Literal["steps"] = "steps"
    steps: int = Field(200_000, ge=1)
    """Optimizer steps."""


class TextTokensDuration(Frozen):
    """As many optimizer steps as a number of text tokens needs."""

    kind: Literal["text_tokens"] = "text_tokens"
    tokens: int = Field(ge=1)
    """Text tokens; meta-tokens do not count."""


Duration = Annotated[StepsDuration | TextTokensDuration, Field(discriminator="kind")]


class StepConfig(Frozen):
    """The optimizer step and its hardware."""

    batch_blocks: int = Field(480, ge=1)
    """Sequences of one optimizer step, over all devices and all accumulated micro-batches."""
    micro_batch_blocks: int = Field(12, ge=1)
    """Sequences of one forward pass on one device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the forward pass under autocast; weights and optimizer stay float32."""
    compile: bool = False
    """Compile the training step with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    skip_spikes: bool = False
    """Change nothing at a step whose loss is six standard deviations above the mean of the last 128; every run warns of
    such a step."""
    deterministic: bool = True
    """Use deterministic kernels only, so that a resumed run gives the same bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    parallel: Parallel = Ddp()
    """How the processes that torchrun starts share the model."""
    distributed_timeout_seconds: int = Field(600, ge=1)
    """How long a process waits for the others before it gives up, while they start, evaluate or save."""
    step_timeout_seconds: int = Field(300, ge=1)
    """How long an optimizer step of several processes may take before they give up; the first one may compile, so it
    has `distributed_timeout_seconds`."""

    @model_validator(mode="after")
    def _divide(self) -> Self:
        if self.batch_blocks % self.micro_batch_blocks:
            raise ValueError(
                f"training.batch_blocks {self.batch_blocks} is not a multiple of "
                f"training.micro_batch_blocks {self.micro_batch_blocks}"
            )
        return self


class TrainingConfig(StepConfig):
    """The optimizer step, its hardware, and how many steps there are."""

    duration: Duration = StepsDuration()
    """How long to train."""


class EvaluationConfig(Frozen):
    """Validation loss during training."""

    interval_steps: int | None = Field(1_000, ge=1)
    """Optimizer steps between evaluations; off means never."""
    blocks: int = Field(200, ge=1)
    """Validation blocks of one evaluation, the first ones of the split; all of them if there are fewer."""


class CheckpointConfig(Frozen):
    """The checkpoints that a run keeps on disk."""

    interval_steps: int | None = Field(1_000, ge=1)
    """Optimizer steps between checkpoints; off means only the last step."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_interval_steps: int | None = Field(None, ge=1)
    """Keep every checkpoint whose step is a multiple of this for ever, besides the newest; off means none."""
    copy_to: str | None = None
    """An address that fsspec knows, such as s3://bucket/run, to which every checkpoint is copied, and from which a run
    without one fetches the newest; off means none."""
    background: bool = False
    """Copy the state in the step and write it beside the next ones, which needs memory for the copy."""


class LoggingConfig(Frozen):
    """The logs that a run writes."""

    interval_steps: int = Field(10, ge=1)
    """Optimizer steps between lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl; each needs its own package."""


class RunConfig(Frozen, ABC):
    """The settings that the training loop needs for any run."""

    short_names: ClassVar[Mapping[str, str]] = {
        "lr": "--optimizer.learning_rate {}",
        "batch": "--training.batch_blocks {}",
    }
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = CosineSchedule()
    training: StepConfig = StepConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the samples and the places of their meta-tokens."""

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""


class TokenRunConfig(RunConfig):
    """The settings of a run on blocks of verified tokens."""

    short_names: ClassVar[Mapping[str, str]] = {
        "steps": "--training.duration.kind steps --training.duration.steps {}",
        "tokens": "--training.duration.kind text_tokens --training.duration.tokens {}",
        **RunConfig.short_names,
    }
    data: DataConfig = DataConfig()
    reconstruct: ReconstructConfig | None = None
    """Have the model give back spans from beyond its window (auto-encoding); off means that blocks are plain text."""
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    @abstractmethod
    def text_tokens_per_block(self) -> int:
        """N: text tokens in a block."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        duration = self.training.duration
        if isinstance(duration, StepsDuration):
            return duration.steps
        return -(-duration.tokens // (self.text_tokens_per_block * self.training.batch_blocks))

    def _check_blocks(self) -> None:
        """Raise ValueError if spans do not fit into a block, or the schedule does not into the run."""
        spans = self.reconstruct
        if spans is not None and 2 * spans.tokens + spans.distance > self.text_tokens_per_block:
            raise ValueError(
                f"reconstruct: 2 x {spans.tokens} tokens and a distance of {spans.distance} do not fit into the "
                f"{self.text_tokens_per_block} text tokens of a block"
            )
        check_schedule(self.schedule, self.total_steps, "training.duration")


class PretrainConfig(TokenRunConfig):
    """A pre-training run."""

    start_from: UserPath | None = None
    """A run, model or checkpoint folder whose weights the run starts from; off means new weights."""
    model: ModelConfig = ModelConfig()
    injection: Injection = UniformInjection()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.block_size > self.model.max_sequence_length:
            stretched = self.model.max_sequence_length != self.model.max_position_embeddings
            raise ValueError(
                f"data.block_size {self.data.block_size} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
                + (f" x model.rope_scaling.factor = {self.model.max_sequence_length}" if stretched else "")
            )
        if self.text_tokens_per_block < 1:
            raise ValueError(
                f"injection leaves no text: {self.injection.num_meta(self.data.block_size)} meta-tokens in "
                f"data.block_size {self.data.block_size}; lower injection.ratio"
            )
        length = self.model.thought_length
        if length is not None and length != getattr(self.injection, "length", None):
            raise ValueError(
                f"model.thought_length {length} needs injection.kind thought with injection.length {length}"
            )
        self._check_landmarks()
        attention = self.model.attention
        if isinstance(attention, BlockRecurrentAttention) and self.data.block_size % attention.window:
            raise ValueError(
                f"data.block_size {self.data.block_size} is not a multiple of model.attention.window {attention.window}"
            )
        self._check_blocks()
        return self

    def _check_landmarks(self) -> None:
        attention = self.model.attention
        if not isinstance(attention, LandmarkAttention):
            return
        num_landmarks = self.injection.num_meta(self.data.block_size)
        fitting = self.data.block_size // (attention.every + 1)
        if num_landmarks == 0:
            raise ValueError("model.attention landmark needs landmarks: choose another injection.kind than none")
        if self.injection.kind == "periodic" and num_landmarks != fitting:
            raise ValueError(
                f"model.attention.every {attention.every} puts {fitting} landmarks into data.block_size "
                f"{self.data.block_size}, but injection.ratio {self.injection.ratio} puts {num_landmarks}"
            )

    @property
    def text_tokens_per_block(self) -> int:
        """N: text tokens in a block; the rest are meta-tokens."""
        return self.data.block_size - self.injection.num_meta(self.data.block_size)
