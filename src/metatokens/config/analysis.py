"""The configuration of an analysis: what is looked at, and which numbers decide, fixed before the run."""

from typing import Annotated, Literal

from pydantic import Field

from metatokens.config.base import Frozen
from metatokens.config.schema import DEFAULT_META_RATIO
from metatokens.config.tasks import Difficulty, Task

Part = Literal["attention", "causal", "rate_distortion", "similarity", "eviction", "knockout", "token_view"]
"""attention: entropy, boost and the theorem's audit; causal: minimal pairs, for a task; similarity, eviction and
knockout: for text."""
Endpoint = Literal[
    "entropy_drop",
    "max_score_boost",
    "log_odds_boost",
    "theorem",
    "excess_cosine",
    "fading_cosine",
    "area",
    "interaction",
    "eviction",
    "zero_position",
    "zero_embedding",
]


class TaskSubject(Frozen):
    """Instances of a recall task are the documents."""

    kind: Literal["task"] = "task"
    task: Task
    difficulty: Difficulty
    pairs: int = Field(64, ge=1)
    """Minimal pairs of the causal part."""


class TextSubject(Frozen):
    """The beginnings of texts are the documents."""

    kind: Literal["text"] = "text"
    source: str
    """As for `metatokens prepare`."""
    window: int = Field(256, ge=16)
    """Positions of a document, its meta-tokens among them; texts that are shorter are left out."""
    ratio: float = Field(DEFAULT_META_RATIO, gt=0, lt=1)
    """k: the share of positions that are meta-tokens, drawn uniformly."""
    prefix_share: float = Field(0.75, gt=0, lt=1)
    """Of the window, for eviction: what comes before the cache is cut."""


class AnalysisConfig(Frozen):
    """What is measured inside of one model."""

    subject: Annotated[TaskSubject | TextSubject, Field(discriminator="kind")]
    documents: int = Field(64, ge=1)
    """Documents or instances: the unit of every interval."""
    calibration_documents: int = Field(16, ge=1)
    """Further documents, for the mean states that cosines are centred on."""
    queries: int = Field(512, ge=1)
    """Attention rows of a document, one from each of so many stretches."""
    distances: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8, 16, 32, 64)
    """Positions back, of the cosines."""
    budgets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.15, 0.2, 0.3, 0.5)
    """Shares of the cache that stay."""
    token_views: int = Field(2, ge=0)
    """Documents that are shown token by token."""
    parts: tuple[Part, ...] = (
        "attention",
        "causal",
        "rate_distortion",
        "similarity",
        "eviction",
        "knockout",
        "token_view",
    )
    """What is run, where the subject allows it."""
    endpoints: tuple[Endpoint, ...] = (
        "entropy_drop", "max_score_boost", "log_odds_boost", "theorem", "excess_cosine", "fading_cosine", "area",
        "interaction", "eviction", "zero_position", "zero_embedding",
    )  # fmt: skip
    """Which numbers decide about a claim; what is left out is not tested. Corrected together (Holm)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of instances, injection, samples and resamples."""
