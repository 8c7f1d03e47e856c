"""The configuration of an analysis: its subject, the numbers that decide, and the heads fitted to states."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from metatokens.config.base import Frozen
from metatokens.config.injection import DEFAULT_META_RATIO
from metatokens.config.tasks import Difficulty, Task

MINIMUM_DOCUMENTS = 8
"""The fewest documents with more than 2,000 different resamples (with replacement): 8 have 6,435, 7 only 1,716."""

LONGEST_VIEW = 2_048
"""The most tokens of a token view: one (T, T) matrix of float32, computed a head at a time, is then 17 MB."""

# 13 points from 1e-4 to 2, evenly spaced in their logarithm
_BETAS = (1e-4, 2.3e-4, 5.2e-4, 1.2e-3, 2.7e-3, 6.2e-3, 0.0141, 0.0323, 0.0737, 0.168, 0.384, 0.876, 2.0)

Share = Annotated[float, Field(gt=0, lt=1)]


class HeadTraining(Frozen):
    """How small heads on fixed states are trained: by Adam, stopped on validation documents."""

    num_seeds: int = Field(5, ge=1)
    """Number of heads of each kind; they share the split and differ in initial weights, batches and noise."""
    train_share: Share = 0.7
    """Share of the documents to train on."""
    validation_share: Share = 0.15
    """Share of the documents that decide when to stop; the rest is the test part."""
    minimum_documents: int = Field(MINIMUM_DOCUMENTS, ge=2)
    """The fewest documents of the test part, over which intervals are taken."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of Adam."""
    batch_size: int = Field(128, ge=1)
    """States in a step, drawn with replacement."""
    max_steps: int = Field(3_000, ge=1)
    """A head that is not done by then is flagged as not converged."""
    evaluation_interval_steps: int = Field(10, ge=1)
    """Steps between evaluations on the validation part."""
    patience_evaluations: int = Field(10, ge=1)
    """Patience: training ends after this many evaluations in a row without a change above `min_change`."""
    min_change: float = Field(1e-3, ge=0)
    """The smallest change of the validation loss that counts, in nats."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.train_share + self.validation_share >= 1:
            raise ValueError(
                f"train_share {self.train_share} and validation_share {self.validation_share} leave nothing to test on"
            )
        return self


class GaussianPrior(Frozen):
    """One diagonal Gaussian, learned; the rate is analytic."""

    kind: Literal["gaussian"] = "gaussian"


class MixturePrior(Frozen):
    """A mixture of diagonal Gaussians, learned; the rate is a mean over sampled codes."""

    kind: Literal["mixture"] = "mixture"
    num_components: int = Field(10, ge=1)
    """Gaussians in the mixture."""


class RateDistortionConfig(HeadTraining):
    """The variational information bottleneck on a state: an encoder, a prior of its code and a linear decoder."""

    betas: tuple[Annotated[float, Field(gt=0)], ...] = Field(_BETAS, min_length=1)
    """Rate weights, ascending: the loss is distortion + beta * rate. Training starts from the largest, and each smaller
    beta starts from the head of the one above it. In the other direction, heads keep what they memorised at a small
    beta."""
    collapsed_rate: float = Field(0.1, ge=0)
    """In nats: below this rate a head has collapsed and is a saddle of the next beta, which then starts from fresh
    weights."""
    hidden_size: int = Field(256, ge=1)
    """Width of the encoder's one hidden layer."""
    code_size: int = Field(32, ge=1)
    """Dimensions of the code z."""
    prior: Annotated[GaussianPrior | MixturePrior, Field(discriminator="kind")] = GaussianPrior()
    """r(z), the prior of the code; the mixture shows how much of a rate is due to the simple Gaussian."""
    num_code_samples: int = Field(16, ge=1)
    """Codes drawn for a state of the test part; the distortion is the mean over them."""

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if list(self.betas) != sorted(set(self.betas)):
            raise ValueError(f"betas must rise, not {self.betas}")
        return self


class LinearProbe(Frozen):
    """Logistic regression."""

    kind: Literal["linear"] = "linear"


class MlpProbe(Frozen):
    """One hidden layer of GELU."""

    kind: Literal["mlp"] = "mlp"
    hidden_size: int = Field(256, ge=1)
    """Width of the hidden layer."""


class ProbeConfig(HeadTraining):
    """A probe, and the online code for the labels that it makes."""

    probe: Annotated[LinearProbe | MlpProbe, Field(discriminator="kind")] = LinearProbe()
    """The family of predictors; information that it cannot use counts as absent."""
    code_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0), min_length=1
    )
    """Ends of the blocks of the online code as shares of the documents (Voita and Titov 2020); the last is 1."""

    @model_validator(mode="after")
    def _check_code_shares(self) -> Self:
        if list(self.code_shares) != sorted(set(self.code_shares)) or self.code_shares[-1] != 1:
            raise ValueError(f"code_shares must rise and end with 1, not {self.code_shares}")
        return self


Part = Literal[
    "attention", "causal", "rate_distortion", "probes", "similarity", "decodability", "output", "eviction", "knockout",
    "token_view", "graft",
]  # fmt: skip
"""attention: entropy, boost and the theorem's audit. decodability and output: what can be read from states, and what
each part of the model adds to its output. causal, rate_distortion and probes need a task; similarity, eviction and
knockout need text. graft: what the anchors of a grafted model do, the one part for such a model."""
FittedState = Literal[
    "last meta-token", "last meta-token, halfway", "ordinary token instead", "token before it", "last token",
    "untrained", "mean embedding",
]  # fmt: skip
"""The states that bottlenecks and probes are fitted to; `metatokens.analysis.inputs.labelled_states` defines them."""
# a claim keeps its name for ever: hashes of what was named before a run are over these
Endpoint = Literal[
    "entropy_drop",
    "max_score_boost",
    "log_odds_boost",
    "theorem",
    "excess_cosine",
    "fading_cosine",
    "area",
    "prefix_area",
    "interaction",
    "meta_path",
    "eviction",
    "zero_position",
    "zero_embedding",
]


class TaskSubject(Frozen):
    """The documents are instances of a recall task."""

    kind: Literal["task"] = "task"
    task: Task
    difficulty: Difficulty
    pairs: int = Field(64, ge=1)
    """Number of minimal pairs of the causal part."""
    fitted_instances: int = Field(2_000, ge=54)
    """Number of further instances, on whose states bottlenecks and probes are trained and tested."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if getattr(self.task, "coupling", None) is not None:
            raise ValueError("subject.task.coupling must be off: an analysis gives its texts positions that count")
        return self


class TextSubject(Frozen):
    """The documents are passages, one from each text."""

    kind: Literal["text"] = "text"
    source: str
    """A source, as for `metatokens prepare`."""
    window: int = Field(256, ge=16)
    """Positions of a document, meta-tokens included; shorter texts are left out."""
    ratio: float = Field(DEFAULT_META_RATIO, gt=0, lt=1)
    """k: the share of positions that are meta-tokens, drawn uniformly."""
    prefix_share: float = Field(0.75, gt=0, lt=1)
    """Share of the window that is read before eviction cuts the cache."""


class GraftSubject(Frozen):
    """The documents are passages of plain text, one from each text, which a grafted model reads."""

    kind: Literal["graft"] = "graft"
    source: str
    """A source, as for `metatokens prepare`."""
    window: int = Field(1024, ge=16)
    """Tokens of a document; shorter texts are left out."""


class AnalysisConfig(Frozen):
    """What an analysis measures inside one model."""

    subject: Annotated[TaskSubject | TextSubject | GraftSubject, Field(discriminator="kind")]
    documents: int = Field(64, ge=MINIMUM_DOCUMENTS)
    """Number of documents or instances, which are the unit of every interval."""
    calibration_documents: int = Field(16, ge=1)
    """Number of further documents, whose mean states centre the cosines."""
    queries: int = Field(512, ge=1)
    """Attention rows measured in a document: it is cut into this many stretches, and each gives one."""
    distances: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Distances of the cosines, in positions back, ascending."""
    newest_kept: int = Field(8, ge=0)
    """Number of latest columns that every eviction policy keeps, beside four sinks."""
    budgets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.15, 0.2, 0.3, 0.5), min_length=1)
    """Shares of the cache that eviction keeps."""
    token_views: int = Field(2, ge=0)
    """Number of documents that the report shows token by token."""
    view_tokens: int = Field(256, ge=16, le=LONGEST_VIEW)
    """Tokens of a token view, from the start of a document; above 256 it keeps only a part of the attention."""
    states: tuple[FittedState, ...] = Field(get_args(FittedState), min_length=1)
    """The states that bottlenecks and probes are fitted to."""
    parts: tuple[Part, ...] = get_args(Part)
    """The parts to run, as far as the subject allows them."""
    endpoints: tuple[Endpoint, ...] = (
        "entropy_drop", "max_score_boost", "log_odds_boost", "theorem", "excess_cosine", "fading_cosine", "area",
        "prefix_area", "interaction", "meta_path", "eviction", "zero_position", "zero_embedding",
    )  # fmt: skip
    """The numbers that decide the claims, corrected together (Holm); claims left out are not tested."""
    rate_distortion: RateDistortionConfig = RateDistortionConfig(num_seeds=3)
    """The heads of the bottleneck."""
    probe: ProbeConfig = ProbeConfig(num_seeds=3)
    """The probes."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the instances, the injection, samples and resamples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.distances) != sorted(set(self.distances)):
            raise ValueError(f"distances must rise, not {self.distances}")
        return self
