"""Checkpoints that are either complete and verified, or absent; `metatokens.training.saving` writes them.

A checkpoint is a folder with the hashes of its files in `manifest.json`, which has its own at its head. The newest that
verifies is the latest, so there is no pointer that could go stale. Tensors are stored as safetensors and everything
else as JSON, so loading cannot run code. A process that holds whole tensors writes one file of weights and one of
moments; processes that hold parts write a file of each. Every run reads either kind. Learning rate, sample order and
injection are functions of the step, so the step, the weights and the optimizer's moments are the whole state.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from metatokens.errors import CheckpointError
from metatokens.model import MetaTokenForCausalLM
from metatokens.storage import file_sha256, seal, unseal
from metatokens.training.distributed import Processes

MANIFEST = "manifest.json"
FORMAT = "checkpoint/1"
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CONFIG = "config.json"
MODEL_CARD = "README.md"
MOMENT_KINDS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter
FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]*/)?[A-Za-z0-9._-]+")
STEP_FOLDER = re.compile(r"step-(\d{8})")
MAX_MANIFEST_BYTES = 2**20

FileEntries = dict[str, dict[str, int | str]]
TensorForm = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class TrainingState:
    """The part of a checkpoint besides tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # `read_state` checks keys and types

    step: int
    """Optimizer steps done, and so the number of the next one, counted from 0."""
    content_id: str
    """Identity of the tokens that the run reads, and of the weights that it started from unless they were new."""
    world_size: int
    """Number of processes; with another number a run continues on the same samples, but not to the bit."""
    skipped_steps: int = 0
    """Steps that changed nothing: their loss or gradient was not finite, or a spike that the config skips."""
    consecutive_skips: int = 0
    """Steps without a finite loss and gradient since the last one with them."""
    loss_spikes: int = 0
    """Steps whose loss was far above those before; see `metatokens.training.spikes`."""
    recent_losses: list[float] = field(default_factory=list)
    """The last finite losses, nats per target, at most `spikes.WINDOW`."""
    text_tokens: int = 0
    """Text tokens of the steps done, over all processes; padding does not count."""
    meta_tokens: int = 0
    """Meta-tokens of the steps done."""
    training_flops: float = 0.0
    """Floating-point operations of the steps done."""
    solved_evaluations: int = 0
    """Evaluations in a row, up to the last, that count towards `SolveConfig.evaluations`."""
    evaluation_due: bool = False
    """Whether the evaluation after the last step was cut short, so that a resume begins with it."""
    final_loss: float | None = None
    """Mean training loss of the last step done, nats per target; None if it was not finite."""
    validation: dict[str, float] = field(default_factory=dict)
    """The last evaluation; empty before the first one."""
    environment: dict[str, str | int] = field(default_factory=dict)
    """What the bits of the last step depended on besides the config; see `run_folder.environment`."""
    bit_exact: bool = True
    """Whether the run has never gone on under conditions that change its bits."""
    resumed_from: str | None = None
    """The SHA-256 of the manifest of the checkpoint that `--resume` named when the run began; None without it."""
    config: dict[str, Any] | None = None
    """The resolved config of the run, as plain values; None in those of older versions, from which no run continues."""
    run_sha256: str | None = None
    """A digest that older versions wrote; it is read and not used."""


def describe_newest(folder: Path) -> str:
    """Return a clause for error messages that names the newest checkpoint; it is not verified."""
    newest = next(iter(step_folders(folder)), None)
    return "no checkpoint was made before" if newest is None else f"checkpoint {newest} is left as it was"


def find_checkpoint(folder: Path, processes: Processes | None = None) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is no checkpoint at all.

    A damaged checkpoint is passed over with a warning. Of several processes the main one chooses; those of each machine
    verify a share of the files.

    Raises:
        CheckpointError: if there are checkpoints but none of them verifies, or another process sees another one.
    """
    processes = processes or Processes()
    problem = None
    for name in processes.gather([path.name for path in step_folders(folder)])[0]:
        path = folder / name
        processes.agree(
            {str(path / MANIFEST): _digest(path / MANIFEST)},
            error=CheckpointError,
            remedy="put --out on a disk that all processes see",
        )
        try:
            with processes.raise_together():
                verify_checkpoint(path, share=processes.node_share)
        except CheckpointError as error:
            if processes.is_main:
                warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            problem = problem or error
        else:
            return path
    if problem is not None:
        raise problem
    return None


def _digest(file: Path) -> str | None:
    """Return the digest of a file, or None if it cannot be read, which `verify_checkpoint` reports."""
    try:
        return file_sha256(file)
    except OSError:
        return None


def describe_files(folder: Path, paths: Iterable[Path]) -> FileEntries:
    """Return the entries of a manifest: size and SHA-256 of each file, by its name in the folder.

    The model card has none: it is text for people, which its owner may edit.
    """
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(paths)
        if path.is_file() and path.name != MODEL_CARD
    }


def write_manifest(folder: Path, files: FileEntries | None = None) -> None:
    """Write a manifest into a folder, with these entries; by default with those of all of its files."""
    entries = describe_files(folder, folder.rglob("*")) if files is None else files
    document = {"format": FORMAT, "files": dict(sorted(entries.items()))}
    (folder / MANIFEST).write_text(seal(json.dumps(document, indent=2) + "\n"))


def verify_checkpoint(path: Path, *, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: the checkpoint.
        share: index and number of the processes that divide the hashing among them; each checks every size.

    Returns:
        The SHA-256 of each file by the manifest.

    Raises:
        CheckpointError: naming the file.
    """
    return _verify(path, needed={CONFIG, STATE}, share=share, remedy="use another checkpoint")


def check_checkpoint(path: Path) -> None:
    """Raise CheckpointError unless the folder has the files that tell a checkpoint; none of them is opened."""
    for name in (STATE, MANIFEST):
        if not (path / name).is_file():
            raise CheckpointError(
                str(path),
                expected=f"a checkpoint, a folder with {STATE} and {MANIFEST}",
                found=f"no {name}" if path.is_dir() else "no such folder",
                remedy="name one of RUN/checkpoints",
            )


def verify_model(path: Path, *, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
    """Compare every file of a model's folder with its manifest, if it has one; the models that runs write have one.

    Args:
        path: the folder.
        share: see `verify_checkpoint`.

    Returns:
        The SHA-256 of each file by the manifest; empty without one.

    Raises:
        CheckpointError: naming the file.
    """
    if not (path / MANIFEST).exists():
        return {}
    remedy = f"use another checkpoint; if the change is yours, remove {MANIFEST}"
    # the hub's cache has only what opens a model: code that is not there cannot run
    return _verify(path, needed={CONFIG}, share=share, remedy=remedy, may_lack=(".py", ".jinja"))


def _verify(
    path: Path, *, needed: set[str], share: tuple[int, int], remedy: str, may_lack: Collection[str] = ()
) -> dict[str, str]:
    expected = _read_manifest(path, needed=needed, remedy=remedy)
    for extra in sorted({file.name for file in path.glob("*.safetensors")} - expected.keys()):
        raise CheckpointError(
            str(path / extra), expected=f"only the tensors of {MANIFEST}", found="a file besides", remedy="move it away"
        )
    index, number = share
    for position, (name, (size, sha256)) in enumerate(sorted(expected.items())):
        file = path / name
        try:
            if not file.is_file():
                if file.suffix in may_lack:
                    continue
                raise CheckpointError(str(file), expected=f"{size} bytes", found="no file", remedy=remedy)
            found = file.stat().st_size
            if found != size:
                raise CheckpointError(str(file), expected=f"{size} bytes", found=f"{found} bytes", remedy=remedy)
            if position % number == index and (digest := file_sha256(file)) != sha256:
                raise CheckpointError(str(file), expected=f"SHA-256 {sha256}", found=digest, remedy=remedy)
        except OSError as error:  # a disk that cannot be read
            reason = error.strerror or str(error)
            raise CheckpointError(str(file), expected="a readable file", found=reason, remedy=remedy) from error
    return {name: sha256 for name, (_, sha256) in expected.items()}


def _read_manifest(path: Path, *, needed: set[str], remedy: str) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file that a manifest names."""
    manifest_path = path / MANIFEST
    try:
        if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        text = manifest_path.read_text(encoding="utf-8")
        manifest = json.loads(unseal(text, str(manifest_path), remedy=remedy, error=CheckpointError))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if manifest["format"] != FORMAT:
            raise ValueError(f"the format {manifest['format']!r}")
        if wrong := [name for name in expected if not FILE_NAME.fullmatch(name)]:
            raise ValueError(f"the file name {wrong[0]!r}")
        if missing := needed - expected.keys():
            raise ValueError(f"no entry {min(missing)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            str(manifest_path), expected=f"a manifest {FORMAT}", found=str(found), remedy=remedy
        ) from None
    return expected


def read_state(path: Path) -> TrainingState:
    """Return the training state of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, or is not a state that this version can read.
    """
    try:
        return TypeAdapter(TrainingState).validate_json((path / STATE).read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_context=False)[0]
            found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            found = error.strerror or str(error)
        raise CheckpointError(
            str(path / STATE), expected="a training state", found=found, remedy="use another checkpoint"
        ) from None


def load_checkpoint(path: Path, model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and moments to the bit; a model that is cut over processes reads its parts.

    Raises:
        CheckpointError: if names, shapes or dtypes are not those of `model`.
    """
    stored = _stored_tensors(path)
    tensors = own_weights(model)
    # AdamW makes moments at a parameter's first step, so a parameter that was never stepped has none
    parameters = {name: p for name, p in model.named_parameters() if f"{MOMENT_KINDS[0]}/{name}" in stored}
    for name, parameter in parameters.items():
        for kind in MOMENT_KINDS:
            # fused AdamW keeps its step beside the parameter
            moment = (
                torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter.detach())
            )
            tensors[f"{kind}/{name}"] = moment
    _check_tensors(path, tensors, stored)
    _read(path, tensors)
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {kind: tensors[f"{kind}/{name}"] for kind in MOMENT_KINDS}


def load_weights(path: Path, model: MetaTokenForCausalLM) -> None:
    """Load the weights of a checkpoint or model folder into `model`, to the bit.

    Raises:
        CheckpointError: if names, shapes or dtypes are not those of `model`.
    """
    weights = own_weights(model)
    stored = {name: form for name, form in _stored_tensors(path).items() if "/" not in name}  # no moments
    _check_tensors(path, weights, stored)
    _read(path, weights)


def own_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model by name, in its own memory; tied ones once."""
    tied = model._tied_weights_keys or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def moments_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer keeps for each parameter, as `kind/name`."""
    return {
        f"{kind}/{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def _stored_tensors(path: Path) -> dict[str, TensorForm]:
    """Return the shape and dtype of every tensor in the files of a folder."""
    for file in sorted(path.glob("*.safetensors")):  # the reader below does not say which file is bad
        with _one_line_errors(file), safe_open(file, framework="pt"):
            pass
    with _one_line_errors(path):
        stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    forms: dict[str, TensorForm] = {}
    for name, entry in stored.items():
        assert isinstance(entry, TensorStorageMetadata)
        forms[name] = tuple(entry.size), entry.properties.dtype
    return forms


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors with those of the same names in a folder, each process by itself."""
    with _one_line_errors(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load_distributed(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(
            str(path), expected="a safetensors file", found=str(error), remedy="use another checkpoint"
        ) from None


def _check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, TensorForm]) -> None:
    remedy = "use a checkpoint of this config"
    for name in sorted(expected.keys() ^ found.keys()):
        where = "in the model only" if name in expected else "in the file only"
        raise CheckpointError(str(path), expected="the model's tensors", found=f"{name} {where}", remedy=remedy)
    for name, tensor in expected.items():
        shape, dtype = found[name]
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{path}: {name}",
                expected=f"{tuple(tensor.shape)} {tensor.dtype}",
                found=f"{shape} {dtype}",
                remedy=remedy,
            )


def step_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first; none if `folder` does not exist yet."""
    return sorted((path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)), reverse=True)
