"""What a graft adds to a decoder that was trained without meta-tokens."""

from typing import Literal

from pydantic import Field

from metatokens.config.base import Frozen

GRAFT_FILE = "graft.safetensors"
"""What is new of a grafted model, in a folder of its own or beside its base."""


class GraftConfig(Frozen):
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
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the first weights of that change, whose effect is zero before training."""
