"""The configuration of a sweep: one training for each combination of labels and each seed.

    preset: tiny/recall
    axes:
      task:
        copying: {task.kind: copying}
        parity: {task: {kind: parity}, curriculum: [{steps: 500, size: [2, 8], prompt_tokens: [1, 32]}]}
      arm:
        meta: {}
        pause: {start.model.meta_attention_layers: none}
    seeds: [0, 1, 2]
    match: flops
    reference: pause
    evaluations:
      - {name: lengths, ask: {lengths: [33-64, 65-128], task.questions: 1}}
      - {name: zeroed, ask: {lengths: [33-64]}, interventions: [zero_embedding], where: {arm: meta}}

That is 2 x 2 x 3 runs. Each has the first evaluation, and those of the arm `meta` have the second one too. A file may
extend another as a preset does. If the runs start from trained models, `start.path` may hold `{seed}` and the axes in
braces, as runs/{arm}/seed-{seed}, which stand for the seed and the labels of the run.

With `training: pretrain` the preset is one of pre-training, and each evaluation measures perplexity:

    training: pretrain
    preset: tiny/meta
    axes:
      arm:
        meta:
        plain: {model.meta_attention_layers: none, injection.kind: none}
    match: text_tokens
    reference: plain
    evaluations: [{name: books, ask: {text: books/test, window: 230}}]
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from metatokens.config.base import Frozen
from metatokens.config.finetuning import CheckpointStart, EvaluateConfig, FinetuneConfig
from metatokens.config.injection import DEFAULT_META_RATIO, PeriodicInjection, UniformInjection
from metatokens.config.loading import YAML_SUFFIXES, load_preset, override_fields
from metatokens.config.schema import PretrainConfig
from metatokens.errors import UsageError


def _read_label(value: Any) -> Any:
    """Read a number, such as a ratio, as the label that it spells."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _read_changes(value: Any) -> Any:
    """Read an empty value as no change, and dotted keys as the nested mapping that they stand for."""
    return _nest(value) if isinstance(value, dict) else {} if value is None else value


def _read_one_or_more(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Label = Annotated[str, BeforeValidator(_read_label), Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*$")]
"""A name that is also the name of a folder."""
Changes = Annotated[dict[str, Any], BeforeValidator(_read_changes)]
"""Changes to a config, as in a preset; keys may be dotted."""
Match = Literal["steps", "text_tokens", "flops"]


class PerplexityConfig(Frozen):
    """A measurement of perplexity: the options of `metatokens perplexity`."""

    text: str = ""
    """A source of text; must be set."""
    window: int | None = Field(None, ge=1)
    """Length of a window; off means all positions of the model."""
    window_unit: Literal["text", "positions"] = "text"
    """Whether meta-tokens count in the window."""
    stride: int | None = Field(None, ge=1)
    """Text tokens by which a sliding window moves; off as in the command."""
    extrapolate: bool = False
    """Allow windows beyond the model's, if its positions have no end."""
    injection: Literal["none", "periodic", "uniform"] = "none"
    """Meta-tokens at evaluation."""
    ratio: float = Field(DEFAULT_META_RATIO, ge=0, lt=1)
    """Share of the positions that are meta-tokens."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the uniform injection."""
    max_tokens: int | None = Field(None, ge=1)
    """Score only this many text tokens at the start of each document."""
    batch_size: int = Field(16, ge=1)
    """Windows in one forward pass."""


class SweepEvaluation(Frozen):
    """An evaluation of the trained models."""

    name: Label
    """Name of its rows in the results."""
    ask: Changes = Field(default_factory=dict)
    """Fields of `metatokens evaluate`. The others are the task and the last size that the run was trained on, and seed
    0, so that all models of a task get the same questions. For pre-training, options of `metatokens perplexity` and its
    `text`; meta-tokens are injected as in training, if that was uniform or periodic, else not at all."""
    interventions: tuple[str, ...] = ()
    """Changes at the meta-tokens, as in `--intervention` of both commands."""
    where: dict[Label, Annotated[tuple[Label, ...], BeforeValidator(_read_one_or_more)]] = Field(default_factory=dict)
    """Axis, and one or more of its labels: only these runs get the evaluation. An axis that is not named does not
    matter."""


SweptConfig: TypeAlias = FinetuneConfig | PretrainConfig
"""The config of one run."""
Question: TypeAlias = EvaluateConfig | PerplexityConfig
"""What an evaluation asks a model."""


class GridPoint(NamedTuple):
    """One combination of labels: the runs that differ in their seed alone."""

    labels: dict[str, str]
    """A label for each axis, in the order of the axes."""
    config: SweptConfig
    """The config of the run with the first seed; `with_seed` gives those of the others."""

    @property
    def name(self) -> str:
        """The labels joined by slashes."""
        return "/".join(self.labels.values()) or "run"

    def with_seed(self, config: SweptConfig, seed: int) -> SweptConfig:
        """Return the config of a run: with its seed, and with the labels and the seed in the path of its start."""
        changes: dict[str, Any] = {"seed": seed}
        if isinstance(config, FinetuneConfig) and isinstance(config.start, CheckpointStart):
            path = config.start.path
            for name, value in {**self.labels, "seed": str(seed)}.items():
                path = path.replace(f"{{{name}}}", value)
            changes["start"] = config.start.model_copy(update={"path": path})
        return config.model_copy(update=changes)


class SweepConfig(Frozen):
    """A grid of trainings, how their budgets are matched, and the evaluations of the trained models."""

    training: Literal["finetune", "pretrain"] = "finetune"
    """What each run is. finetune: on a recall task, evaluated by accuracy; pretrain: on text, by perplexity."""
    preset: str = "tiny/recall"
    """The preset that every run changes: its name, or a YAML file beside this one."""
    axes: dict[Label, Annotated[dict[Label, Changes], Field(min_length=1)]] = Field(default_factory=dict)
    """Axis, label, and its changes to the preset; each combination of one label from every axis is a run."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0, 1, 2), min_length=1)
    """Seeds; each combination is trained once with each."""
    match: Match = "steps"
    """The budget that all arms share with the reference, under the same labels of the other axes. steps: each arm keeps
    the steps of its curriculum, which must agree. text_tokens, flops: the steps of each stage are scaled until the text
    tokens, or the operations of training, agree; the numbers of the learning-rate schedule stay."""
    reference: Label | None = None
    """Label of the arm that sets the budget and that the others are compared with; off means no reference."""
    tolerance: float = Field(0.05, ge=0, lt=1)
    """Largest allowed difference between an arm's matched budget and the reference's, as a share of the latter; with
    match steps it bounds the text tokens."""
    evaluations: tuple[SweepEvaluation, ...] = Field((SweepEvaluation(name="trained"),), min_length=1)
    """The evaluations of each trained model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [evaluation.name for evaluation in self.evaluations]
        for key, values in (("seeds", self.seeds), ("evaluations.name", tuple(names))):
            if len(set(values)) < len(values):
                raise ValueError(f"{key} {list(values)} has an entry twice")
        if self.reference is None and self.match != "steps":
            raise ValueError(f"match {self.match} needs a reference, the label of an arm")
        if self.reference is not None:
            self._check_reference(self.reference)
        for evaluation in self.evaluations:
            for axis, labels in evaluation.where.items():
                _check_known(f"evaluations {evaluation.name}: where.{axis}", axis, self.axes)
                for label in labels:
                    _check_known(f"evaluations {evaluation.name}: where.{axis} {label}", label, self.axes[axis])
        self._check_overlap()
        return self

    def _check_reference(self, reference: str) -> None:
        axes = [axis for axis, labels in self.axes.items() if reference in labels]
        _check_known(f"reference {reference}", reference, [label for labels in self.axes.values() for label in labels])
        if len(axes) > 1:
            raise ValueError(f"reference {reference} is a label of both axes.{axes[0]} and axes.{axes[1]}")

    def _check_overlap(self) -> None:
        keys = {
            axis: {key: f"axes.{axis}.{label}" for label, changes in labels.items() for key in _leaves(changes)}
            for axis, labels in self.axes.items()
        }
        for own in keys.values():
            if "seed" in own:
                raise ValueError(f"{own['seed']} sets seed, which only seeds may")
        for first, second in combinations(keys.values(), 2):
            for one, other in product(first, second):
                if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."):
                    raise ValueError(f"{first[one]} and {second[other]} both set {max(one, other)}")

    @property
    def arm_axis(self) -> str | None:
        """The axis whose labels are compared: the reference's axis, or else the last one; None without axes."""
        holding = [axis for axis, labels in self.axes.items() if self.reference in labels]
        return holding[0] if holding else next(reversed(self.axes), None)


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """Load a sweep by the path of its YAML file; a preset that is a file lies beside it.

    Args:
        path: path of the file.
        overrides: as for a preset, but not of axes, because labels are names and not keys.

    Raises:
        UsageError: a key or label is unknown (with the nearest name), or settings do not agree.
    """
    overrides = list(overrides)
    inside = [flag for flag in overrides if flag.startswith("--axes")]
    if inside:
        raise UsageError(
            inside[0], expected="axes as in the file", found="an override", remedy="write a file that `extends:` it"
        )
    config = load_preset(path, overrides, schema=SweepConfig)
    if config.preset.endswith(YAML_SUFFIXES):
        config = config.model_copy(update={"preset": str(Path(path).parent / config.preset)})
    return config


def expand(sweep: SweepConfig, origin: str) -> list[GridPoint]:
    """Return every combination of labels with its run's config; the last axis varies fastest.

    Raises:
        UsageError: a preset or a change gives no valid run; the message names the labels.
    """
    base: SweptConfig
    if sweep.training == "finetune":
        base = load_preset(sweep.preset, schema=FinetuneConfig)
    else:
        base = load_preset(sweep.preset, schema=PretrainConfig)
    points = []
    for labels in product(*sweep.axes.values()):
        named = dict(zip(sweep.axes, labels, strict=True))
        changes: dict[str, Any] = {"seed": sweep.seeds[0]}
        for axis, label in named.items():
            changes = _join(changes, sweep.axes[axis][label])
        where = ", ".join(f"{axis} {label}" for axis, label in named.items())
        points.append(GridPoint(named, override_fields(base, changes, f"{origin}, {where}" if where else origin)))
    return points


def evaluations_of(sweep: SweepConfig, point: GridPoint, origin: str) -> Iterator[tuple[SweepEvaluation, Question]]:
    """Yield the evaluations of a combination, each with its resolved config.

    Raises:
        UsageError: a field of `ask` does not exist, its value does not fit, or a text is missing.
    """
    base = _question_as_trained(point.config)
    for evaluation in sweep.evaluations:
        if all(point.labels[axis] in labels for axis, labels in evaluation.where.items()):
            where = f"{origin}, {point.name}: evaluations {evaluation.name}: ask"
            question = override_fields(base, evaluation.ask, where)
            _check_injection(point.config, evaluation.ask, where)
            if isinstance(question, PerplexityConfig) and not question.text:
                raise UsageError(where, expected="a text to score", found="none", remedy="add text: SOURCE to ask")
            yield evaluation, question


def _check_injection(config: SweptConfig, ask: Mapping[str, Any], where: str) -> None:
    """Refuse to score a model without the injection of its training, unless that is asked for."""
    known = ("none", "periodic", "uniform")
    if isinstance(config, PretrainConfig) and config.injection.kind not in known and "injection" not in ask:
        expected = f"an injection that texts can be scored with: {', '.join(known)}"
        raise UsageError(where, expected=expected, found=config.injection.kind, remedy="add injection: to ask")


def _question_as_trained(config: SweptConfig) -> Question:
    if isinstance(config, FinetuneConfig):
        return EvaluateConfig(task=config.task, size=config.curriculum[-1].size)
    if isinstance(config.injection, PeriodicInjection | UniformInjection):
        return PerplexityConfig(injection=config.injection.kind, ratio=config.injection.ratio)
    return PerplexityConfig()


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"{what} is not in axes; {hint}")


def _nest(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings.

    Raises:
        ValueError: a key is set twice.
    """
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        tree = _nest(value) if isinstance(value, dict) else value
        for name in reversed(str(key).split(".")):
            tree = {name: tree}
        nested = _join(nested, tree)
    return nested


def _join(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join two nested mappings.

    Raises:
        ValueError: a leaf is in both.
    """
    joined = dict(first)
    for key, value in second.items():
        if key in joined and not (isinstance(joined[key], dict) and isinstance(value, dict)):
            raise ValueError(f"{prefix}{key} is set twice")
        joined[key] = _join(joined[key], value, f"{prefix}{key}.") if key in joined else value
    return joined


def _leaves(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a nested mapping."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
