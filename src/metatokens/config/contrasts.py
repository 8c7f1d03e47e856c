"""Contrasts between the arms of sweeps, named before the first run; `metatokens.replication.contrasts` judges them."""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from metatokens.config.schema import Frozen
from metatokens.config.tasks import check_bin

_BETTER = {"solve": ("faster",), "nats": ("lower",), "accuracy": ("higher", "lower")}
"""What an explanation may predict of the first side, by endpoint; a control is expected to be equivalent anywhere."""


class Side(NamedTuple):
    """What is compared."""

    arm: str
    evaluation: str


class Contrast(Frozen):
    """Two sides, and what their difference would explain."""

    explains: str
    first: str
    """An arm. Of `accuracy`, ARM@EVALUATION is an arm asked in another evaluation of the sweep than the others."""
    second: str
    expected: Literal["faster", "lower", "higher", "equivalent"]
    """What the explanation predicts of the first side; a control is expected to be equivalent."""


class Contrasts(Frozen):
    """A file of contrasts, which is fixed before the first run."""

    endpoint: Literal["solve", "nats", "accuracy"] = "solve"
    """What is compared: the steps until a task is solved, nats per word on a text, or the share of answers right."""
    evaluation: str = ""
    """Of `nats` and `accuracy`, the name of the evaluation in the sweep."""
    lengths: tuple[Annotated[str, AfterValidator(check_bin)], ...] = ()
    """Of `accuracy`, the lengths of the prompts that are compared."""
    level: float = Field(0.05, gt=0, lt=1)
    """Of the p-values, which are corrected after Holm over the contrasts of a task, and their lengths."""
    margin: float = Field(gt=0)
    """Sides that differ by less are equivalent: a ratio of steps, nats per word, or a share of the answers."""
    in_summary: bool = True
    """Whether the summary of all explanations shows them."""
    tasks: dict[str, int] = Field(min_length=1)
    """Sweeps, and the seeds of their arms."""
    contrasts: tuple[Contrast, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.endpoint == "solve" and self.margin <= 1:
            raise ValueError("the margin of solve is a ratio above 1")
        if self.endpoint == "accuracy" and self.margin >= 1:
            raise ValueError("the margin of accuracy is a share below 1: 0.05 for 5 points")
        if (self.endpoint != "solve") != bool(self.evaluation):
            raise ValueError("nats and accuracy need an evaluation, and solve has none")
        if (self.endpoint == "accuracy") != bool(self.lengths):
            raise ValueError("accuracy needs lengths, and no other endpoint has any")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths {list(self.lengths)} has an entry twice")
        for one in self.contrasts:
            if self.side(one.first) == self.side(one.second):
                raise ValueError("contrasts compares an arm with itself")
            if self.endpoint != "accuracy" and "@" in one.first + one.second:
                raise ValueError("only accuracy compares evaluations, as ARM@EVALUATION")
            if one.expected not in (*_BETTER[self.endpoint], "equivalent"):
                raise ValueError(f"{self.endpoint} cannot be expected to be {one.expected}")
        return self

    def side(self, name: str) -> Side:
        """Return the arm and the evaluation that `first` or `second` of a contrast names."""
        arm, _, evaluation = name.partition("@")
        return Side(arm, evaluation or self.evaluation)

    @property
    def sides(self) -> list[Side]:
        """All that is compared, each once, in the order in which it is named."""
        return list(dict.fromkeys(self.side(name) for one in self.contrasts for name in (one.first, one.second)))

    @property
    def arms(self) -> set[str]:
        """All arms that are compared."""
        return {side.arm for side in self.sides}
