"""The plan of a sweep: each run's config, folder and evaluations, and its budget, matched to the reference's.

A budget is estimated from the first batches of each stage, some hundreds of instances: the text tokens of a step, and
its operations as `metatokens.model.accounting` counts them. It is a pure function of the config.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig, FreshStart
from metatokens.config.loading import override_fields
from metatokens.config.sweep import GridPoint, Question, SweepConfig, SweptConfig, evaluations_of, expand
from metatokens.config.tasks import Difficulty, length_bin
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import check_interventions, parse_intervention
from metatokens.generation.decoding import sequence_limit
from metatokens.model.accounting import training_flops
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.registry import make_instance
from metatokens.training.finetuning import build_on_meta_device, training_batches
from metatokens.training.initialization import build_model_on_meta_device
from metatokens.training.pretraining import first_batch
from metatokens.training.run_folder import RunFolder
from metatokens.training.setup import count_batch_flops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from metatokens.config.schema import ModelConfig, PretrainConfig
    from metatokens.data.loader import Batch

_SAMPLED_INSTANCES = 512  # the fewest instances of each stage, or all of a shorter one
_MEASURED_BY = {"steps": "text_tokens", "text_tokens": "text_tokens", "flops": "training_flops"}
_UNITS = {"text_tokens": "text tokens", "training_flops": "training FLOPs"}


@dataclass(frozen=True)
class Budget:
    """The cost of a run, estimated before it starts."""

    steps: int
    text_tokens: float
    training_flops: float
    flops_of_stages: tuple[float, ...]
    """Operations of one step of each stage."""


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation of a run."""

    name: str
    config: Question
    interventions: tuple[str, ...]


@dataclass(frozen=True)
class WindowSizes:
    """The numbers of positions that a model can take; None if its config states no bound."""

    own: int | None
    original: int | None
    """The window before positions were scaled, by YaRN for example; equal to `own` if they were not."""

    @classmethod
    def of(cls, model: Any) -> WindowSizes:
        """Read the windows of a model's config."""
        own = sequence_limit(model)
        rope = getattr(model.config, "rope_parameters", None) or {}
        scaled_from = None if own is None else round(own / rope.get("factor", 1))
        return cls(own, rope.get("original_max_position_embeddings", scaled_from))


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    labels: dict[str, str]
    seed: int
    folder: RunFolder
    config: SweptConfig
    evaluations: tuple[EvaluationRequest, ...]
    parameters: int
    windows: WindowSizes
    budget: Budget

    @property
    def name(self) -> str:
        """The labels and the seed, joined by slashes."""
        return "/".join((*self.labels.values(), f"seed-{self.seed}"))


@dataclass(frozen=True)
class Promised:
    """What other commands will have made before a sweep runs, so that it can be planned before they do."""

    models: Mapping[str, ModelConfig]
    """By the paths that runs start from."""
    text_vocab_size: int
    """Of the tokens that runs pre-train on, and of the models."""


@dataclass(frozen=True)
class _Arm:
    """A combination of labels with the costs of a step in each of its stages."""

    point: GridPoint
    evaluations: tuple[EvaluationRequest, ...]
    parameters: int
    windows: WindowSizes
    text_tokens: tuple[float, ...]
    flops: tuple[float, ...]

    def budget(self, steps: Sequence[int]) -> Budget:
        """Return the cost of a run with these steps in its stages."""
        return Budget(
            steps=sum(steps),
            text_tokens=sum(n * tokens for n, tokens in zip(steps, self.text_tokens, strict=True)),
            training_flops=sum(n * flops for n, flops in zip(steps, self.flops, strict=True)),
            flops_of_stages=self.flops,
        )


def plan_sweep(sweep: SweepConfig, out: Path, origin: str, *, promised: Promised | None = None) -> list[SweepRun]:
    """Return the runs in order, with seeds outermost, so that a grid cut short has whole seeds.

    Args:
        sweep: its config.
        out: folder of the sweep; nothing is written.
        origin: name of the sweep's file, for messages.
        promised: models and tokens that need not exist yet. Trained models then count with a tokenizer of the task's
            words; the output layer makes logits for answers alone, so that the difference is small.

    Raises:
        UsageError: a run cannot be trained or evaluated, or arms cannot share a budget.
    """
    estimator = _CostEstimator(promised)
    arms = [estimator.arm(sweep, point, origin) for point in expand(sweep, origin)]
    configs = [_match_budget(sweep, arm, _reference_of(sweep, arm, arms), origin) for arm in arms]
    return [
        SweepRun(
            labels=arm.point.labels,
            seed=seed,
            folder=RunFolder(out.joinpath("runs", *arm.point.labels.values(), f"seed-{seed}")),
            config=arm.point.with_seed(config, seed),
            evaluations=arm.evaluations,
            parameters=arm.parameters,
            windows=arm.windows,
            budget=arm.budget(stage_steps(config)),
        )
        for seed in sweep.seeds
        for arm, config in zip(arms, configs, strict=True)
    ]


def stage_steps(config: SweptConfig) -> list[int]:
    """Return the steps of each stage of a run; pre-training is one stage."""
    if isinstance(config, FinetuneConfig):
        return [stage.steps for stage in config.curriculum]
    return [config.total_steps]


def matching_text(sweep: SweepConfig) -> str:
    """Return what the arms have in common, in words."""
    shared = {"steps": "the same steps", "text_tokens": "equal text tokens", "flops": "equal training FLOPs"}
    if sweep.reference is None:
        return "each arm its own steps"
    return f"{shared[sweep.match]} as {sweep.reference}"


def describe_plan(sweep: SweepConfig, runs: Sequence[SweepRun]) -> dict[str, Any]:
    """Return what a sweep would do, for `--dry-run`."""
    return {
        "matching": matching_text(sweep),
        "training_flops": sum(run.budget.training_flops for run in runs),
        "runs": [
            {
                "run": run.name,
                "parameters": run.parameters,
                "steps": run.budget.steps,
                "text_tokens": round(run.budget.text_tokens),
                "training_flops": run.budget.training_flops,
                "evaluations": ", ".join(evaluation.name for evaluation in run.evaluations),
                "state": "trained" if run.folder.is_finished(run.config) else "to do",
            }
            for run in runs
        ],
    }


# Costs -------------------------------------------------------------------------------------------------------


class _CostEstimator:
    """Measures costs of combinations and checks them; work that several share is done once."""

    def __init__(self, promised: Promised | None) -> None:
        self._promised = promised
        self._batches: dict[str, list[list[Batch]]] = {}
        self._fillable: set[tuple[str, str]] = set()

    def arm(self, sweep: SweepConfig, point: GridPoint, origin: str) -> _Arm:
        """Return a combination with its costs, after all checks that need no training."""
        config = self._from_promised_model(point.with_seed(point.config, sweep.seeds[0]))
        tokenizer = None
        if isinstance(config, FinetuneConfig):
            model, tokenizer = build_on_meta_device(config)
            stages = self._sample(config, model, tokenizer)
            _check_window(stages, model, f"{origin}, {point.name}")
            costs = [_mean_cost(model, batches) for batches in stages]
        elif self._promised is None:
            model, _, batch = first_batch(config)
            costs = [_mean_cost(model, [batch])]
        else:
            model, cost = _cost_of_a_shape(config, self._promised.text_vocab_size)
            costs = [cost]
        evaluations = tuple(
            EvaluationRequest(evaluation.name, question, evaluation.interventions)
            for evaluation, question in evaluations_of(sweep, point, origin)
        )
        for evaluation in evaluations:
            try:
                check_interventions(model, [parse_intervention(text) for text in evaluation.interventions])
                if isinstance(evaluation.config, EvaluateConfig):
                    self._check_fillable(evaluation.config, PieceEncoder(TextEncoder(tokenizer)))
            except UsageError as error:
                raise UsageError(
                    f"{origin}, {point.name}: evaluations {evaluation.name}",
                    expected="an evaluation that its models can answer",
                    found=str(error),
                    remedy="choose other runs with where",
                ) from None
        return _Arm(
            point=point,
            evaluations=evaluations,
            parameters=model.num_parameters(),
            windows=WindowSizes.of(model),
            text_tokens=tuple(text_tokens for text_tokens, _ in costs),
            flops=tuple(flops for _, flops in costs),
        )

    def _from_promised_model(self, config: SweptConfig) -> SweptConfig:
        """Return the config with a new model of the same shape in place of one that is still to be trained."""
        if self._promised is None or not isinstance(config, FinetuneConfig) or isinstance(config.start, FreshStart):
            return config
        path = posixpath.normpath(config.start.path)
        if path not in self._promised.models:
            expected = f"a model that an earlier command makes: {', '.join(self._promised.models) or 'none does'}"
            raise UsageError("start.path", expected=expected, found=path, remedy="correct the path or the plan")
        return config.model_copy(update={"start": FreshStart(model=self._promised.models[path])})

    def _sample(self, config: FinetuneConfig, model: Any, tokenizer: Any) -> list[list[Batch]]:
        """Return the first groups of batches of each stage; arms that read the same share them."""
        encoder = TextEncoder(tokenizer)
        key = repr(
            (
                (encoder.sha256, model.config.meta_token_id, getattr(model.config, "loss_policy", None)),
                config.model_dump_json(include={"task", "curriculum", "train_instances", "bucket_batches", "seed"}),
                config.training.batch_blocks,
            )
        )
        if key not in self._batches:
            batches, first = training_batches(config, model, tokenizer), 0
            stages: list[list[Batch]] = []
            # whole groups: the batches of one are sorted by length
            num_groups = -(-_SAMPLED_INSTANCES // (config.bucket_batches * config.training.batch_blocks))
            for stage in config.curriculum:
                steps = range(first, first + min(num_groups * config.bucket_batches, stage.steps))
                stages.append([batches.batch_at(step) for step in steps])
                first += stage.steps
            self._batches[key] = stages
        return self._batches[key]

    def _check_fillable(self, config: EvaluateConfig, encoder: PieceEncoder) -> None:
        """Raise the error of the evaluation if no instance has one of the lengths."""
        for length in config.lengths:
            key = (encoder.text_encoder.sha256, config.model_dump_json(include={"task", "size", "seed"}) + length)
            if key not in self._fillable:
                difficulty = Difficulty(size=config.size, prompt_tokens=length_bin(length))
                make_instance(config.task, difficulty, encoder=encoder, seed=config.seed, split="test", index=0)
                self._fillable.add(key)


def _mean_cost(model: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return the text tokens and the operations of a step."""
    return _mean([batch.num_text for batch in batches]), _mean([count_batch_flops(model, batch) for batch in batches])


def _cost_of_a_shape(config: PretrainConfig, text_vocab_size: int) -> tuple[Any, tuple[float, float]]:
    """Return the model on the meta device, and the text tokens and the operations of a step of pre-training."""
    model = build_model_on_meta_device(config.model, text_vocab_size=text_vocab_size, eos_token_id=text_vocab_size - 1)
    num_text, blocks = config.text_tokens_per_block, config.training.batch_blocks
    num_positions = config.data.block_size
    flops = training_flops(model.config, num_positions=num_positions, num_meta=num_positions - num_text)
    return model, (float(blocks * num_text), float(blocks * flops))


def _check_window(stages: Sequence[Sequence[Batch]], model: Any, origin: str) -> None:
    limit = sequence_limit(model)
    longest = max(batch.input_ids.shape[1] for batches in stages for batch in batches)
    if limit is not None and longest > limit:
        raise UsageError(
            f"{origin}: curriculum",
            expected=f"batches of at most the {limit} positions of the model",
            found=f"one of {longest}, answers and meta-tokens included",
            remedy="raise start.model.max_position_embeddings, or shorten the last stages",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Matching ----------------------------------------------------------------------------------------------------


def _reference_of(sweep: SweepConfig, arm: _Arm, arms: Sequence[_Arm]) -> _Arm | None:
    """Return the reference of an arm: the arm with the reference's label and the same labels of the other axes."""
    axis = sweep.arm_axis
    if sweep.reference is None or axis is None:
        return None
    labels = {**arm.point.labels, axis: sweep.reference}
    return next(other for other in arms if other.point.labels == labels)


def _match_budget(sweep: SweepConfig, arm: _Arm, reference: _Arm | None, origin: str) -> SweptConfig:
    """Return the config of an arm, with steps that match its budget to the reference's."""
    config = arm.point.config
    if reference is None or reference is arm:
        return config
    measured = _MEASURED_BY[sweep.match]
    theirs, stages = reference.budget(stage_steps(reference.point.config)), stage_steps(config)
    own = arm.budget(stages)
    if sweep.match == "steps":
        if own.steps != theirs.steps:
            raise _unmatched(
                origin, arm, reference, "the same steps", f"{own.steps} and {theirs.steps}", "choose another match"
            )
    else:
        target, spent = getattr(theirs, measured), getattr(own, measured)
        steps = scale_steps(stages, target / spent)
        if steps is None:
            found = f"{own.steps * target / spent:.1f} steps for {len(stages)} stages"
            raise _unmatched(origin, arm, reference, "a step for each stage", found, "lengthen the reference")
        config = _with_steps(config, steps, f"{origin}, {arm.point.name}, matched to {reference.point.name}")
        own = arm.budget(steps)
    ratio = getattr(own, measured) / getattr(theirs, measured)
    if abs(ratio - 1) > sweep.tolerance:
        raise _unmatched(
            origin,
            arm,
            reference,
            f"{_UNITS[measured]} within {sweep.tolerance:.1%} of each other",
            f"a ratio of {ratio:.3f}",
            "give both the same batches and curriculum, raise tolerance, or choose another match",
        )
    return config


def scale_steps(steps: Sequence[int], factor: float) -> list[int] | None:
    """Scale the steps of stages by a factor, to at least 1 each and a rounded sum; None if that is too small.

    Steps that rounding leaves over go to the stages with the largest remainders.
    """
    ideal = [count * factor for count in steps]
    total = round(sum(ideal))
    if total < len(steps):
        return None
    scaled = [max(1, int(count)) for count in ideal]
    by_remainder = sorted(range(len(steps)), key=lambda i: scaled[i] - ideal[i])
    for index in by_remainder[: max(0, total - sum(scaled))]:
        scaled[index] += 1
    while sum(scaled) > total:  # some stages were raised to one step
        scaled[max(range(len(steps)), key=lambda i: scaled[i] - ideal[i] if scaled[i] > 1 else float("-inf"))] -= 1
    return scaled


def _with_steps(config: SweptConfig, steps: Sequence[int], origin: str) -> SweptConfig:
    if not isinstance(config, FinetuneConfig):
        duration = {"kind": "steps", "steps": sum(steps)}
        return override_fields(config, {"training": {"duration": duration}}, origin)
    curriculum = [
        {**stage.model_dump(mode="json"), "steps": count} for stage, count in zip(config.curriculum, steps, strict=True)
    ]
    return override_fields(config, {"curriculum": curriculum}, origin)


def _unmatched(origin: str, arm: _Arm, reference: _Arm, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(
        f"{origin}: budgets of {arm.point.name} and {reference.point.name}",
        expected=expected,
        found=found,
        remedy=remedy,
    )
