"""Where meta-tokens go into a block of text (paper, section 4.1): one class a policy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metatokens.config.base import Frozen

DEFAULT_META_RATIO = 0.1  # paper section 4.1: k = 0.1


class _Injection(Frozen):
    @property
    def follows_punctuation(self) -> bool:
        """Whether places depend on where clauses end."""
        return False


class NoInjection(_Injection):
    """No meta-token at all."""

    kind: Literal["none"] = "none"

    def num_meta(self, block_size: int) -> int:
        """Return the number of meta-tokens in a block of `block_size` positions."""
        del block_size
        return 0


class _RatioInjection(_Injection):
    ratio: float = Field(DEFAULT_META_RATIO, ge=0, lt=1)
    """k: the share of a block's positions that are meta-tokens."""

    def num_meta(self, block_size: int) -> int:
        """Return the number of meta-tokens in a block of `block_size` positions."""
        return round(self.ratio * block_size)


class UniformInjection(_RatioInjection):
    """Positions drawn uniformly at random without a period (the paper's policy)."""

    kind: Literal["uniform"] = "uniform"


class PeriodicInjection(_RatioInjection):
    """Evenly spaced positions, the last one at the end of the block."""

    kind: Literal["periodic"] = "periodic"


class PunctuationInjection(_RatioInjection):
    """Right after tokens that end a clause; uniform draws drop or add positions to keep the count fixed."""

    kind: Literal["punctuation"] = "punctuation"

    @property
    def follows_punctuation(self) -> bool:
        """Whether places depend on where clauses end."""
        return True


class ThoughtInjection(_RatioInjection):
    """Thoughts after Quiet-STaR: runs of meta-tokens, a start, `length` tokens and an end, at even or chosen places."""

    kind: Literal["thought"] = "thought"
    length: int = Field(8, ge=1)
    """Meta-tokens between start and end."""
    after: Literal["period", "punctuation"] = "period"
    """Where thoughts stand, as single meta-tokens do under the policies periodic and punctuation."""

    @property
    def follows_punctuation(self) -> bool:
        """Whether places depend on where clauses end."""
        return self.after == "punctuation"

    @property
    def num_tokens(self) -> int:
        """Meta-tokens of one thought, start and end included."""
        return self.length + 2

    def num_meta(self, block_size: int) -> int:
        """Return the number of meta-tokens in a block of `block_size` positions, those of whole thoughts."""
        return round(self.ratio * block_size / self.num_tokens) * self.num_tokens


class ExplicitInjection(_Injection):
    """The same given positions in every block."""

    kind: Literal["explicit"] = "explicit"
    positions: tuple[Annotated[int, Field(ge=0)], ...]
    """Indices in the block, meta-tokens included in the count; strictly ascending."""

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if any(a >= b for a, b in zip(self.positions, self.positions[1:], strict=False)):
            raise ValueError("injection.positions must ascend strictly, for example [0, 8, 16]")
        return self

    def num_meta(self, block_size: int) -> int:
        """Return the number of meta-tokens in a block of `block_size` positions."""
        if self.positions and self.positions[-1] >= block_size:
            raise ValueError(f"injection.positions ends at {self.positions[-1]}, beyond data.block_size {block_size}")
        return len(self.positions)


Injection = Annotated[
    NoInjection | UniformInjection | PeriodicInjection | PunctuationInjection | ThoughtInjection | ExplicitInjection,
    Field(discriminator="kind"),
]
