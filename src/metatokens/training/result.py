"""The result of a training: what result.json holds, and the results of runs that have ended before."""

import json
from dataclasses import asdict, dataclass, replace

from pydantic import ConfigDict, TypeAdapter, ValidationError

from metatokens.config.schema import RunConfig
from metatokens.errors import DataError
from metatokens.training.checkpoint import step_folders, verify_model
from metatokens.training.distributed import Processes
from metatokens.training.run_folder import RunFolder

# what a checkpoint knows of its run, and so says whether a result is one of it
_OF_THE_RUN = ("num_parameters", "steps", "text_tokens", "meta_tokens", "final_loss", "validation", "solved")


@dataclass(frozen=True)
class TrainingResult:
    """The measurements of a finished run."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # `read_result` checks keys and types

    run: str
    model: str
    num_parameters: int
    steps: int
    text_tokens: int
    meta_tokens: int
    training_flops: float
    """Operations of forward and backward passes, counted, not measured; see `metatokens.model.accounting`."""
    final_loss: float | None
    """Mean training loss of the last step, nats per target; None if there was no step."""
    validation: dict[str, float]
    """The last evaluation; empty if there was none."""
    text_tokens_per_second: float | None
    """Mean over the steps since the run last started, without evaluation and saving; None without a step."""
    meta_tokens_per_second: float | None
    waited_for_batches: float
    """Time spent waiting for the loader, as a share of the training time."""
    solved: bool | None = None
    """Whether the run ended because its task was solved, after `steps`; None if it does not stop for that."""
    bit_exact: bool = True
    """Whether the bits are those of a run that was never interrupted; events.jsonl has the reasons why not."""


def measured_before(config: RunConfig, folder: RunFolder, processes: Processes) -> TrainingResult | None:
    """Return the result of a run that has ended and whose checkpoints were removed; None for any other run."""
    measured = None
    with processes.raise_together():
        if processes.is_main and not step_folders(folder.checkpoints_path) and folder.is_finished(config):
            verify_model(folder.model_path)
            measured = read_result(folder)
    measured = processes.gather(measured)[0]
    if measured is None:
        return None
    return replace(measured, run=str(folder.path), model=str(folder.model_path))


def read_result(folder: RunFolder) -> TrainingResult:
    """Return the result that a run has written.

    Raises:
        DataError: there is no result.json, it is not what was written, or its keys or types are others.
    """
    try:
        return TypeAdapter(TrainingResult).validate_json(json.dumps(folder.read_result()), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise DataError(
            str(folder.result_path),
            expected="the measurements of a run",
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            remedy="remove it, and the same command writes it again from the last checkpoint",
        ) from None


def written_before(folder: RunFolder, result: TrainingResult) -> TrainingResult:
    """Return the result that an earlier process wrote, with its speeds.

    Args:
        folder: of the run.
        result: as the last checkpoint has it.

    Raises:
        DataError: it is not what was written, or not one of this run.
    """
    read = read_result(folder)
    written, expected = asdict(read), asdict(result)
    for key in _OF_THE_RUN:
        # older checkpoints did not keep the loss and the evaluation
        is_known = key not in {"final_loss", "validation"} or result.final_loss is not None
        if is_known and written[key] != expected[key]:
            raise DataError(
                str(folder.result_path),
                expected=f"{key} {expected[key]!r} as in the last checkpoint",
                found=repr(written[key]),
                remedy="remove it, and the same command writes it again",
            )
    return replace(read, run=result.run, model=result.model)
