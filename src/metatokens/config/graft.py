"""What a graft adds to a decoder that was trained without meta-tokens.

This file travels with a graft's checkpoint as remote code, so it imports the standard library alone; the `graft` of a
run's config, `metatokens.config.grafting.GraftFields`, has the same fields.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

GRAFT_FILE = "graft.safetensors"
"""What is new of a grafted model, in a folder of its own or beside its base."""


@dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """Where the anchors stand, what is seen of the past, and how much of the model is new."""

    window: int = 256
    """Tokens of text that a token sees, itself among them."""
    num_sinks: int = 4
    """First tokens of the text, which stay visible for ever; no anchor follows them."""
    anchors: Literal["meta", "every"] = "meta"
    """meta: an anchor is a token of its own and follows every n-th of the text; every: every n-th token of the text is
    itself kept and changed, the control."""
    every: int = 9
    """n: text tokens from one anchor to the next."""
    reveal: Literal["evicted", "always"] = "evicted"
    """evicted: an anchor stands in for the token before it, and is seen once that token has left the window; always:
    every later token sees it, as it sees the anchors "every" in any case."""
    memory_limit: int | None = None
    """Newest anchors that stay; None means all."""
    positions: Literal["text", "compact"] = "text"
    """text: an anchor has the position of the token before it; compact: kept tokens are counted among themselves and
    stand right in front of the window, for texts with more tokens than the model has positions (RoPE alone)."""
    lora_rank: int = 8
    """Rank of the change to every matrix of a block, which acts at anchors alone; 0 means none."""
    meta_attention: bool = False
    """Let the anchors attend among themselves once more in every block, by weights of its own; not with positions
    "compact"."""
    seed: int = 0
    """Seed of the first weights of both, whose effect is zero before training; below 2**31."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: for one that is out of range.
        """
        lowest = {"window": 1, "num_sinks": 0, "every": 1, "memory_limit": 1, "lora_rank": 0, "seed": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            is_off = name == "memory_limit" and value is None
            if not is_off and not (type(value) is int and least <= value < 2**31):
                raise ValueError(f"GraftConfig.{name} must be a whole number of at least {least}, not {value!r}")
        choices = {"anchors": ("meta", "every"), "reveal": ("evicted", "always"), "positions": ("text", "compact")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GraftConfig.{name} must be one of {allowed}, not {getattr(self, name)!r}")
        if type(self.meta_attention) is not bool:
            raise ValueError(f"GraftConfig.meta_attention must be true or false, not {self.meta_attention!r}")
        if self.meta_attention and self.positions == "compact":
            raise ValueError('GraftConfig.meta_attention true needs positions "text", and not "compact"')

    @classmethod
    def read(cls, values: Any) -> Self:
        """Return the config of a file.

        Raises:
            ValueError: it is none, or has an unknown or wrong field.
        """
        if not isinstance(values, dict):
            raise ValueError(f"GraftConfig must be an object, not {values!r}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"GraftConfig has no {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**values)
