"""How RoPE is stretched to a longer window than the trained one."""

from typing import Annotated, Any, Literal

from pydantic import Field

from metatokens.config.base import Frozen


class NoScaling(Frozen):
    """RoPE as trained."""

    kind: Literal["none"] = "none"

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of transformers' `rope_parameters`."""
        return {"rope_type": "default"}


class LinearScaling(Frozen):
    """Position interpolation: positions divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)
    """New window / trained window."""

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of transformers' `rope_parameters`."""
        return {"rope_type": "linear", "factor": self.factor}


class DynamicScaling(Frozen):
    """NTK-aware base that grows with the sequence."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float = Field(ge=1)
    """New window / trained window."""

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of transformers' `rope_parameters`."""
        return {"rope_type": "dynamic", "factor": self.factor}


class YarnScaling(Frozen):
    """YaRN with the paper's parameters (appendix)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    """New window / trained window."""
    original_max_position_embeddings: int = Field(1024, ge=1)
    """The trained window, in positions."""
    beta_fast: float = 32
    """Rotations over the trained window above which a frequency is kept."""
    beta_slow: float = 1
    """Rotations over the trained window below which a frequency is divided by `factor`."""
    attention_factor: float | None = None
    """Factor on cos and sin; off means 0.1 ln(factor) + 1, which the paper and YaRN's code call attention factor 1."""

    def to_hf(self) -> dict[str, Any]:
        """Return the entries of transformers' `rope_parameters`."""
        fields = self.model_dump(exclude={"kind"}, exclude_none=True)
        return {"rope_type": "yarn", **fields}


RopeScaling = Annotated[NoScaling | LinearScaling | DynamicScaling | YarnScaling, Field(discriminator="kind")]
