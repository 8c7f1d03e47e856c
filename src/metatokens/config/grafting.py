"""The configuration of the training of a graft: what is grafted, the text, and what the new parts learn from."""

from typing import Literal, Self

from pydantic import Field, model_validator

from metatokens.config.base import Frozen
from metatokens.config.graft import GraftConfig
from metatokens.config.parallel import Fsdp2
from metatokens.config.schema import TokenRunConfig


class Objectives(Frozen):
    """The weight of each objective of `metatokens.graft.objectives`, by its name; at 0 it is not computed."""

    distillation: float = Field(1.0, ge=0)
    """KL divergence of the grafted model's predictions from those of the same model under full attention."""
    language_model: float = Field(1.0, ge=0)
    """Loss of the text's own next tokens."""
    needles: float = Field(1.0, ge=0)
    """Loss of the answers that `needles` asks for, whose mean counts as the loss of a whole block; without these no
    effect."""


class NeedlesConfig(Frozen):
    """Blocks that hide something in their text and end with a question about it, from beyond the window."""

    share: float = Field(0.25, gt=0, le=1)
    """Share of the blocks; the others are as without needles."""
    tasks: tuple[Literal["needle", "multi-key", "multi-value", "variables", "passkey", "copying"], ...] = Field(
        ("needle", "multi-key"), min_length=1
    )
    """Tasks of the long-context suite, one of which is drawn for each such block."""


class GraftFields(Frozen):
    """Where the anchors stand, what is seen of the past, and how much of the model is new."""

    window: int = Field(256, ge=1)
    """Tokens of text that a token sees, itself among them."""
    num_sinks: int = Field(4, ge=0)
    """First tokens of the text, which stay visible for ever; no anchor follows them."""
    anchors: Literal["meta", "every"] = "meta"
    """meta: an anchor is a token of its own and follows every n-th of the text; every: every n-th token of the text is
    itself kept and changed, the control."""
    every: int = Field(9, ge=1)
    """n: text tokens from one anchor to the next."""
    reveal: Literal["evicted", "always"] = "evicted"
    """evicted: an anchor stands in for the token before it, and is seen once that token has left the window; always:
    every later token sees it, as it sees the anchors "every" in any case."""
    memory_limit: int | None = Field(None, ge=1)
    """Newest anchors that stay; off means all."""
    positions: Literal["text", "compact"] = "text"
    """text: an anchor has the position of the token before it; compact: kept tokens are counted among themselves and
    stand right in front of the window, for texts with more tokens than the model has positions (RoPE alone)."""
    lora_rank: int = Field(8, ge=0)
    """Rank of the change to every matrix of a block, which acts at anchors alone; 0 means none."""
    meta_attention: bool = False
    """Let the anchors attend among themselves once more in every block, by weights of its own; not with positions
    "compact"."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the first weights of both, whose effect is zero before training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.build()
        return self

    def build(self) -> GraftConfig:
        """Return what `metatokens.graft.graft` takes."""
        return GraftConfig(**self.model_dump())


class GraftRunConfig(TokenRunConfig):
    """The training of the new parts of a grafted decoder, whose own weights are frozen."""

    base: str | None = None
    """A folder of a decoder of transformers, or its id on the hub."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type that the frozen weights are held in; what is trained is float32."""
    graft: GraftFields = GraftFields()
    needles: NeedlesConfig | None = None
    """Have the model answer questions about what is gone; off means none. A block with a needle ends with its answer
    and not with a span."""
    objectives: Objectives = Objectives()
    sampled_positions: int = Field(256, ge=1)
    """Positions of a block at which distillation compares predictions, drawn anew for each block; fewer than all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, graft = self.data.block_size, self.graft
        if self.sampled_positions >= size:
            raise ValueError(f"sampled_positions {self.sampled_positions} is not less than data.block_size {size}")
        if isinstance(self.training.parallel, Fsdp2) or self.training.compile:
            raise ValueError("a graft is trained with training.parallel.kind ddp and without training.compile")
        if graft.window + graft.every + graft.num_sinks > size:
            raise ValueError(
                f"data.block_size {size} is less than graft.window {graft.window}, graft.every {graft.every} and "
                f"graft.num_sinks {graft.num_sinks} together, so that no token may see an anchor"
            )
        weights = self.objectives.model_dump(exclude=set() if self.needles else {"needles"})
        if not any(weights.values()):
            raise ValueError(f"objectives: the weight of {' and '.join(weights)} is 0, so nothing would be learned")
        self._check_blocks()
        return self

    @property
    def anchors_per_block(self) -> int:
        """Anchors that the model reads beside the text tokens of a block."""
        return self.kept_per_block if self.graft.anchors == "meta" else 0

    @property
    def kept_per_block(self) -> int:
        """Anchors that are left of a block at its end."""
        graft = self.graft
        return self.data.block_size // graft.every - graft.num_sinks // graft.every

    @property
    def text_tokens_per_block(self) -> int:
        """T: all of a block, which anchors do not count to."""
        return self.data.block_size
