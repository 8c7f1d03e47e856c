"""The schema of a sweep's results.json.

One `CellResult` is one combination of labels over all seeds that are done. What each model answered on each instance
stays in the run folders (evaluation.json); here are the intervals that were drawn from it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from metatokens import storage
from metatokens.errors import DataError
from metatokens.evaluation.statistics import Interval
from metatokens.evaluation.survival import Times

RESULTS_FORMAT = "sweep/1"


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy of a cell's models at one length."""

    length: str
    """Name of the bin, or lo-hi, in text tokens of the prompt."""
    prompt_tokens: tuple[int, int]
    size: tuple[int, int]
    instances: int
    seeds: tuple[int, ...]
    """Seeds whose models have been evaluated."""
    token_accuracy: Interval | None
    """Over seeds and instances; None, or n/a, where the model cannot represent the length."""
    sequence_accuracy: Interval | None
    """None where `token_accuracy` is."""
    difference: Interval | None
    """Sequence accuracy minus the reference's, paired by seed and instance; None for the reference, without one, or
    where either is n/a or was evaluated on other instances."""
    sequence_by_seed: tuple[float, ...] = ()
    """Sequence accuracy of each of `seeds`: fewer than `MINIMUM_SEEDS` are shown one by one, since an interval over so
    few is too narrow. Empty where `token_accuracy` is None, and in files older than this field."""
    difference_by_seed: tuple[float, ...] = ()
    """`difference` of each seed that both arms have; empty where it is None, and in older files."""
    chance: float | None = None
    """Share of whole answers that guesses get right; None in files older than this field."""


@dataclass(frozen=True)
class EvaluationResult:
    """The rows of one evaluation."""

    name: str
    meta_places: str
    interventions: tuple[str, ...]
    rows: tuple[AccuracyRow, ...]


@dataclass(frozen=True)
class ContextRow:
    """Loss of the tokens with about as much context, mean over seeds."""

    lowest: int
    """Fewest text tokens of context."""
    highest: int
    nats_per_token: float


@dataclass(frozen=True)
class PerplexityRow:
    """Loss of a cell's models on one text, in sliding windows."""

    name: str
    """Of the evaluation."""
    text: str
    """The source of the text."""
    interventions: tuple[str, ...]
    documents: int
    seeds: tuple[int, ...]
    """Of the trainings asked so far."""
    perplexity: float
    """Per text token, mean over seeds in nats."""
    nats_per_word: Interval
    """Mean over seeds, with the interval over documents."""
    by_seed: tuple[float, ...]
    """Nats per word of each of `seeds`."""
    difference: Interval | None
    """Nats per word minus the reference's, paired by seed and document; None for the reference, without one, or where
    it scored other documents."""
    difference_by_seed: tuple[float, ...]
    """`difference` of each seed that both arms have; empty where it is None."""
    by_context: tuple[ContextRow, ...]


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy during training, on test instances at the difficulty of the last stage."""

    step: int
    training_flops: float
    """Spent so far, the total of the run shared out by the estimated costs of the stages."""
    sequence_accuracy: float
    """Mean over seeds."""
    lowest: float
    """Of the seeds."""
    highest: float
    """Of the seeds."""
    chance: float | None = None
    """Share of whole answers that guesses get right; None in files older than this field."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The end of one training, and what it cost."""

    seed: int
    steps: int
    solved: bool | None
    """Whether it ended because its task was solved; None if it does not stop for that."""
    training_flops: float
    """Counted, not measured."""
    cpu_seconds: float
    """Of all its processes, evaluations of the trained model included; without imports that were made for all."""


@dataclass(frozen=True)
class CellResult:
    """What the runs of one combination of labels have in common, and how well they did."""

    labels: dict[str, str]
    task: str
    """The recall task, or pre-training."""
    matching: str
    """What this arm has in common with the reference."""
    seeds: tuple[int, ...]
    """That are done."""
    models: tuple[str, ...]
    """Their folders, below that of the sweep."""
    parameters: int
    steps: int
    """Mean over seeds, which differ only where a training stops once its task is solved."""
    text_tokens: float
    """Trained on, mean over seeds."""
    meta_tokens: float
    training_flops: float
    """Counted, not measured; mean over seeds."""
    trained_to: int
    """Text tokens of the longest prompt of the last stage, or of a block of pre-training."""
    curve: tuple[CurvePoint, ...]
    evaluations: tuple[EvaluationResult, ...]
    window: int | None = None
    """Positions that the models can take; None where there is no bound, and in files older than this field."""
    original_window: int | None = None
    """`window` before their positions were scaled."""
    trainings: tuple[TrainingOutcome, ...] = ()
    """One for each of `seeds`; empty in files older than this field."""
    perplexities: tuple[PerplexityRow, ...] = ()
    """Of pre-training, in place of `evaluations`."""


@dataclass(frozen=True)
class FailedRun:
    """A run that ended with an error."""

    run: str
    error: str


@dataclass(frozen=True)
class SweepResults:
    """What `metatokens sweep` writes."""

    format: str
    sweep: dict[str, Any]
    """The sweep's config, all fields."""
    arm_axis: str | None
    """The axis whose labels are compared."""
    runs: int
    done: int
    failed: tuple[FailedRun, ...]
    versions: dict[str, str]
    cells: tuple[CellResult, ...]
    """In the order of the axes; those without a finished run are left out."""


def panels(results: SweepResults) -> dict[str, list[CellResult]]:
    """Return the cells that are compared with one another, under the labels of the other axes as one name."""
    grouped: dict[str, list[CellResult]] = {}
    for cell in results.cells:
        axes = [axis for axis, labels in results.sweep["axes"].items() if axis != results.arm_axis and len(labels) > 1]
        labels = [cell.labels[axis] for axis in axes]
        grouped.setdefault(", ".join(labels) or cell.task, []).append(cell)
    return grouped


def arm_name(results: SweepResults, cell: CellResult) -> str:
    """Return the label that a cell has among those it is compared with."""
    return cell.labels[results.arm_axis] if results.arm_axis else cell.task


def solve_times(cell: CellResult) -> Times:
    """Return the steps that the trainings of a cell needed; they are censored at the last step of the curriculum."""
    steps = [one.steps for one in cell.trainings]
    return Times.of(steps, [bool(one.solved) for one in cell.trainings], max(steps))


def to_json(results: SweepResults) -> str:
    """Write results as JSON."""
    return storage.to_json(asdict(results), indent=1) + "\n"


def load_results(path: Path) -> SweepResults:
    """Read results.json.

    Raises:
        DataError: no file, one that was altered, or one of another format.
    """
    remedy = "run the sweep again"
    text = storage.read_sealed(path, remedy=remedy)
    try:
        return TypeAdapter(SweepResults).validate_json(text)
    except ValidationError as error:
        found = str(error).splitlines()[0]
        raise DataError(
            str(path), expected=f"results of the format {RESULTS_FORMAT}", found=found, remedy=remedy
        ) from None
