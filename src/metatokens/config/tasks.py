"""The configuration of a recall task (paper section 3): the question, its difficulty, and the meta-tokens' places.

A `Task` says what an instance is and a `Difficulty` how large it is; together with a seed, a split and an index they
determine it (`metatokens.tasks.registry.make_instance`). Both are independent of the model and of its tokenizer.
"""

import difflib
import re
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from metatokens.config.base import Frozen
from metatokens.config.injection import DEFAULT_META_RATIO
from metatokens.errors import UsageError

LENGTH_BINS = MappingProxyType(
    {
        "easy": (1, 128),
        "medium": (129, 256),
        "hard": (257, 512),
        "extra-hard": (513, 1024),
        "long": (1025, 2048),
    }
)
"""Inclusive bounds of the prompt's length in text tokens, by difficulty (paper section 3)."""


def length_bin(name: str) -> tuple[int, int]:
    """Return the inclusive bounds of a bin by its name, or of any range by "lo-hi", for example "2049-4096".

    Raises:
        UsageError: The text is neither a name nor a range.
    """
    if name in LENGTH_BINS:
        return LENGTH_BINS[name]
    bounds = re.fullmatch(r"(\d+)-(\d+)", name)
    if bounds is not None and 1 <= int(bounds[1]) <= int(bounds[2]):
        return int(bounds[1]), int(bounds[2])
    close = difflib.get_close_matches(name, LENGTH_BINS, n=1, cutoff=0.5)
    raise UsageError(
        "length bin",
        expected=f"{', '.join(LENGTH_BINS)}, or a range of tokens as 2049-4096",
        found=repr(name),
        remedy=f"did you mean {close[0]!r}?" if close else "name one of them",
    )


def _check_rise(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range goes from the lower to the higher bound, not from {bounds[0]} to {bounds[1]}")
    return bounds


def check_bin(name: str) -> str:
    """Return the name of a bin or a range unchanged; raise ValueError, for pydantic, if it is neither."""
    _read_bin(name)
    return name


def _read_bin(bounds: Any) -> Any:
    """Read the name of a bin as its bounds."""
    try:
        return length_bin(bounds) if isinstance(bounds, str) else bounds
    except UsageError as error:
        raise ValueError(str(error)) from error  # pydantic adds the path of the field to a ValueError only


Range: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], AfterValidator(_check_rise)
]
"""Inclusive bounds, both at least 1."""


class Difficulty(Frozen):
    """How large an instance is: two knobs that every task has."""

    size: Range
    """Bounds of the task's own size: items per list (list_recall, list_pointer, segment_counting), words of a span
    (copying), bits before the last meta-token (parity)."""
    prompt_tokens: Annotated[Range, BeforeValidator(_read_bin)]
    """Bounds of the prompt's length: the number of text tokens before the last answer. Also the name of a
    bin (easy, medium, hard, extra-hard, long) or a range as "2049-4096"."""


# Where meta-tokens stand ---------------------------------------------------------------------------------------


class TaskPlaces(Frozen):
    """The places that the task gives a meaning (the paper's policy).

    For list_recall and list_pointer, a meta-token stands right after the list in question. The place alone tells which
    list holds the answer, so a model that sees it never has to read a name.
    """

    kind: Literal["task"] = "task"


class EveryPlaces(Frozen):
    """A meta-token after each list, so that none tells anything about the question."""

    kind: Literal["every"] = "every"


class DecoyPlaces(Frozen):
    """As many meta-tokens as at the task's places, in the same form, but drawn independently of the question."""

    kind: Literal["decoy"] = "decoy"


class UniformPlaces(Frozen):
    """Drawn uniformly over the prompt, as in pre-training; never inside an answer."""

    kind: Literal["uniform"] = "uniform"
    meta_ratio: float = Field(DEFAULT_META_RATIO, ge=0, lt=1)
    """k: the share of meta-tokens in the instance without its answers."""


class PeriodicPlaces(Frozen):
    """After every n-th text token of the prompt, never inside an answer."""

    kind: Literal["periodic"] = "periodic"
    every: Annotated[int, Field(ge=1)] | Range = 9
    """n; or its bounds, between which each instance draws one."""


class NoPlaces(Frozen):
    """No meta-token at all; marks stand at the task's places."""

    kind: Literal["none"] = "none"


MetaPlaces = Annotated[
    TaskPlaces | EveryPlaces | DecoyPlaces | UniformPlaces | PeriodicPlaces | NoPlaces, Field(discriminator="kind")
]
UnlistedPlaces = Annotated[
    TaskPlaces | DecoyPlaces | UniformPlaces | PeriodicPlaces | NoPlaces, Field(discriminator="kind")
]
"""The places in a text without lists."""

# Tasks -------------------------------------------------------------------------------------------------------


class _Task(Frozen):
    questions: int = Field(1, ge=1)
    """Questions about one prompt, each followed by its answer; several make the training signal denser."""
    meta_places: MetaPlaces = TaskPlaces()
    """Where meta-tokens stand; the choice changes nothing in the text but the marks."""
    loss: Literal["answer", "full"] = "answer"
    """answer: a loss term for each token of the answers; full: one for each text token but the first."""


class MarkedTask(_Task):
    """A task that asks about marked places of the text."""

    marks: bool | Literal["double"] = True
    """Visible marks (brackets, bars) at the task's places, wherever the meta-tokens stand, so that the text alone tells
    the answer. Without marks only meta-tokens at those places tell it, as in the paper. double: two in a row, so that
    an ordinary token stands where another model has a meta-token; the second one does not count towards
    difficulty.prompt_tokens."""

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        if not self.marks and self.meta_places.kind != "task":
            raise ValueError(
                f"marks false with meta_places {self.meta_places.kind}: nothing would tell which part the question "
                "means; keep the marks, or meta_places task"
            )
        return self


class _UnlistedTask(MarkedTask):
    meta_places: UnlistedPlaces = TaskPlaces()
    """Where meta-tokens stand; the choice changes nothing in the text but the marks."""


class _ListTask(_Task):
    numbered: bool = True
    """Write its number before each item of a list."""
    num_lists: Range = (2, 200)
    """Bounds of the number of lists; within them, the prompt's length decides."""


class _RecallTask(_ListTask):
    marks: bool = False
    """A bar right after the place of each meta-token, so that a model without meta-tokens is told as much as one with
    them. Bars do not count towards difficulty.prompt_tokens, so the text is the same with and without them."""
    coupling: Literal["items"] | None = None
    """Tokens that belong together share a position, in a model with learned positions. items: item j of every list, the
    questions about it and their answers; off means that positions count the tokens."""

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        if self.marks and self.meta_places.kind in ("uniform", "periodic"):
            raise ValueError(
                f"marks true with meta_places {self.meta_places.kind}: these places are between tokens, where text "
                "cannot have marks"
            )
        return self


class ListRecallTask(_RecallTask):
    """Item j of a named list."""

    kind: Literal["list_recall"] = "list_recall"


class ListPointerTask(_RecallTask):
    """Item j of a named list, scored as a single choice over the items of the prompt."""

    kind: Literal["list_pointer"] = "list_pointer"


class SegmentCountingTask(_ListTask, MarkedTask):
    """How often an item occurs in a marked segment of a list."""

    kind: Literal["segment_counting"] = "segment_counting"
    num_items: int = Field(4, ge=1)
    """Number of different items in a prompt; fewer items give higher counts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.questions > self.num_items:
            raise ValueError(f"questions {self.questions} ask for more items than num_items {self.num_items}")
        return self


class ParityTask(_UnlistedTask):
    """The exclusive or of all bits before a mark."""

    kind: Literal["parity"] = "parity"


class CopyingTask(_UnlistedTask):
    """The words between two marks, exactly."""

    kind: Literal["copying"] = "copying"
    distance: int | None = Field(None, ge=1)
    """Least number of words between the last span and the end of the text, so that a span lies beyond a window; off
    means that it may stand anywhere."""
    symbols: int | None = Field(None, ge=2, le=200)
    """Number of different words in the spans, which then stand nowhere else in the text; off means any word."""
    coupling: Literal["span"] | None = None
    """Tokens that belong together share a position, in a model with learned positions. span: token i of a span and of
    its answer; off means that positions count the tokens."""


Task = Annotated[
    ListRecallTask | SegmentCountingTask | ParityTask | CopyingTask | ListPointerTask, Field(discriminator="kind")
]
