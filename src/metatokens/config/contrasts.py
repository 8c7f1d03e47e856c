"""Contrasts between the arms of sweeps, named before the first run; `metatokens.replication.contrasts` judges them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from metatokens.config.schema import Frozen


class Contrast(Frozen):
    """Two arms, and what their difference would explain."""

    explains: str
    first: str
    second: str
    expected: Literal["faster", "lower", "equivalent"]
    """What the explanation predicts of the first arm; a control is expected to be equivalent."""


class Contrasts(Frozen):
    """A file of contrasts, which is fixed before the first run."""

    endpoint: Literal["solve", "nats"] = "solve"
    """What is compared: the steps until a task is solved, or nats per word on a text."""
    evaluation: str = ""
    """Of `nats`, the name of the perplexity in the sweep."""
    level: float = Field(0.05, gt=0, lt=1)
    """Of the p-values, which are corrected after Holm over the contrasts of a task."""
    margin: float = Field(gt=0)
    """Arms that differ by less are equivalent: a ratio of steps, or nats per word."""
    tasks: dict[str, int] = Field(min_length=1)
    """Sweeps, and the seeds of their arms."""
    contrasts: tuple[Contrast, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint == "solve" and self.margin <= 1:
            raise ValueError("the margin of solve is a ratio above 1")
        if (self.endpoint == "nats") != bool(self.evaluation):
            raise ValueError("nats needs an evaluation, and solve has none")
        if any(contrast.first == contrast.second for contrast in self.contrasts):
            raise ValueError("contrasts compares an arm with itself")
        return self

    @property
    def arms(self) -> set[str]:
        """All arms that are compared."""
        return {arm for contrast in self.contrasts for arm in (contrast.first, contrast.second)}
