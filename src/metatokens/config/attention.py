"""What the causal self-attention sees: everything, what memory mode keeps, a pattern, a state, or blocks by landmarks.

The models of all kinds but the first two are in `metatokens.baselines`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from metatokens.config.base import Frozen


class FullAttention(Frozen):
    """Every earlier token."""

    kind: Literal["full"] = "full"

    def to_hf(self) -> dict[str, Any]:
        """Return the fields of the Hugging Face config."""
        return {}


class SparseAttention(Frozen):
    """Base of the sparse patterns."""

    layers: Literal["all", "odd"] | tuple[Annotated[int, Field(ge=0)], ...] = "all"
    """Blocks with the pattern, the others seeing everything: "all", "odd" (alternating, as in GPT-Neo) or indices."""

    def to_hf(self) -> dict[str, Any]:
        """Return the fields of the Hugging Face config."""
        return {"attention_pattern": self.model_dump(mode="json")}


class SlidingWindowAttention(SparseAttention):
    """The last tokens only; with layers odd and the default window, these are the masks of GPT-Neo."""

    kind: Literal["sliding_window"] = "sliding_window"
    window: int = Field(256, ge=1)
    """Keys that a query sees, itself among them."""


class BlockwiseAttention(SparseAttention):
    """Blocks of half the window: a token sees its own and the one before, so a trained model reads longer texts."""

    kind: Literal["blockwise"] = "blockwise"
    window: int = Field(256, ge=2, multiple_of=2)
    """Tokens of two blocks; the longest text of the training."""


class LongformerAttention(SparseAttention):
    """A sliding window, and global tokens: all later tokens see them, and they see all earlier ones."""

    kind: Literal["longformer"] = "longformer"
    window: int = Field(256, ge=1)
    """Keys that a query sees, itself among them, besides the global ones."""
    num_global_tokens: int = Field(1, ge=0)
    """Global tokens at the start of the sequence."""
    meta_tokens_are_global: bool = False
    """Make the meta-tokens global too."""


class BigBirdAttention(SparseAttention):
    """A window of blocks, global blocks at the start, and past blocks drawn at random."""

    kind: Literal["bigbird"] = "bigbird"
    block_size: int = Field(64, ge=1)
    """Tokens in a block."""
    window_blocks: int = Field(3, ge=1)
    """Blocks of the window: the query's own and the ones right before it."""
    num_global_blocks: int = Field(2, ge=0)
    """Blocks at the start that every token sees."""
    num_random_blocks: int = Field(3, ge=0)
    """Further past blocks that each block sees, drawn once for each layer."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the random blocks; the same in training and evaluation."""


class BlockRecurrentAttention(SparseAttention):
    """The Block-Recurrent Transformer: a sliding window, and in one block a state that every window of text changes."""

    kind: Literal["block_recurrent"] = "block_recurrent"
    window: int = Field(512, ge=1)
    """Keys that a query sees, itself among them, and tokens from one change of the state to the next."""
    num_state_vectors: int = Field(512, ge=1)
    """S: vectors of the state."""
    recurrent_layer: int = Field(9, ge=0)
    """The block that has the state, counted from 0."""
    gates: Literal["skip", "dual"] = "skip"
    """skip: the state has no feed-forward part, and one gate; dual: it has one, with a gate of its own."""


class LandmarkAttention(Frozen):
    """Landmark attention: each meta-token stands for the block of text that it ends."""

    kind: Literal["landmark"] = "landmark"
    every: int = Field(50, ge=1)
    """Text tokens before each landmark. It must agree with a periodic injection; any other injection sets its own
    blocks."""

    def to_hf(self) -> dict[str, Any]:
        """Return the fields of the Hugging Face config."""
        return {"landmark_every": self.every}


class MemoryAttention(SparseAttention):
    """A window of text, the first tokens, and anchors of the rest; what leaves the window also leaves the cache."""

    kind: Literal["memory"] = "memory"
    window: int = Field(256, ge=1)
    """Tokens of text that a token sees, itself among them."""
    num_sinks: int = Field(4, ge=0)
    """First tokens of the text, which stay visible for ever."""
    anchors: Literal["meta", "every", "pooled"] = "every"
    """What stays of old text. every: every n-th token of text, which no other was shown to beat; meta: its meta-tokens;
    pooled: the meta-tokens, with the mean keys and values of the text since the one before."""
    every: int = Field(9, ge=1)
    """n, for anchors every."""
    reveal: Literal["evicted", "always"] = "evicted"
    """evicted: text sees a meta-token once the text before it has left the window; always: at once."""
    memory_limit: int | None = Field(None, ge=1)
    """Newest anchors that stay; off means all."""
    positions: Literal["all", "text", "compact"] = "all"
    """What positions count: all tokens; text: text alone, so that a meta-token has the position of the token before
    it; compact: kept tokens are counted among themselves, for texts longer than those of the training."""

    def to_hf(self) -> dict[str, Any]:
        """Return the fields of the Hugging Face config."""
        return {"memory": self.model_dump(mode="json", exclude={"kind"})}


Attention = Annotated[
    FullAttention
    | MemoryAttention
    | SlidingWindowAttention
    | BlockwiseAttention
    | LongformerAttention
    | BigBirdAttention
    | BlockRecurrentAttention
    | LandmarkAttention,
    Field(discriminator="kind"),
]


def attention_from_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attention, as plain values, that `to_hf` turned into `fields`."""
    if fields.get("memory"):
        return {"kind": "memory", **fields["memory"]}
    if "landmark_every" in fields:
        return {"kind": "landmark", "every": fields["landmark_every"]}
    return dict(fields.get("attention_pattern") or {"kind": "full"})
