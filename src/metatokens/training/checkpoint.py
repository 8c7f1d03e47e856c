"""Checkpoints that are either complete and verified, or absent.

A checkpoint is written into a temporary folder, with the hashes of its files in `manifest.json`, flushed to the disk
and renamed into place. The newest checkpoint that verifies is the latest, so there is no pointer that could go stale.
Tensors are stored as safetensors and everything else as JSON, so loading cannot run code. Learning rate, sample order
and injection are functions of the step, so the step, the weights and the optimizer's moments are the whole state.
"""

import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metatokens.errors import CheckpointError, NumericError
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from metatokens.storage import file_sha256, new_folder

MANIFEST = "manifest.json"
FORMAT = "checkpoint/1"
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CONFIG = "config.json"
MODEL_CARD = "README.md"
MOMENT_KINDS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter
FILE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]*/)?[A-Za-z0-9._-]+")
STEP_FOLDER = re.compile(r"step-(\d{8})")
MAX_MANIFEST_BYTES = 2**20


@dataclass(frozen=True)
class TrainingState:
    """The part of a checkpoint besides tensors."""

    step: int
    """Optimizer steps done, and so the number of the next one, counted from 0."""
    content_id: str
    """Identity of the tokens that the run reads, and of the weights that it started from unless they were new."""
    world_size: int
    """Number of processes; with another number a run continues on the same samples, but not to the bit."""
    skipped_steps: int = 0
    """Steps that changed nothing because their loss or gradient was not finite."""
    consecutive_skips: int = 0
    """Skipped steps since the last step that was not skipped."""
    text_tokens: int = 0
    """Text tokens of the steps done, over all processes; padding does not count."""
    meta_tokens: int = 0
    """Meta-tokens of the steps done."""
    training_flops: float = 0.0
    """Floating-point operations of the steps done."""
    solved_evaluations: int = 0
    """Evaluations in a row, up to the last, that count towards `SolveConfig.evaluations`."""
    config: dict[str, Any] | None = None
    """The resolved config of the run, as plain values; None in older checkpoints, which did not keep it."""
    run_sha256: str | None = None
    """The digest that some older checkpoints have instead of `config` (see `run_folder.run_sha256`)."""


def save_checkpoint(
    folder: Path,
    model: MetaTokenForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    *,
    tokenizer: Any,
    keep: int,
) -> Path:
    """Commit a checkpoint under `folder`, then remove all but the `keep` newest; returns its path.

    Raises:
        NumericError: if a weight is not finite, because such a checkpoint would replace a good one.
        ResourceError: if it cannot be written, as on a full disk; no part of the new checkpoint stays.
    """
    final = folder / f"step-{state.step:08d}"
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise NumericError(
            str(final),
            expected="finite weights",
            found="infinities or NaN",
            remedy=f"lower optimizer.learning_rate; {describe_newest(folder)}",
        )
    if final.exists():
        # this one was damaged: the run passed over it, continued from an older one and has reached its step again
        shutil.rmtree(final)
    with new_folder(final) as temporary:
        save_model(model, temporary, tokenizer)
        save_file(_optimizer_tensors(model, optimizer), temporary / MOMENTS)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        write_manifest(temporary)
    # do not count a damaged checkpoint of a later step, or the new one would be removed as old
    for old in [path for path in _step_folders(folder) if path.name <= final.name][keep:]:
        shutil.rmtree(old)
    return final


def describe_newest(folder: Path) -> str:
    """Return a clause for error messages that names the newest checkpoint; it is not verified."""
    newest = next(iter(_step_folders(folder)), None)
    return "no checkpoint was made before" if newest is None else f"checkpoint {newest} is left as it was"


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None if there is no checkpoint at all.

    A damaged checkpoint is passed over with a warning.

    Raises:
        CheckpointError: if there are checkpoints but none of them verifies.
    """
    problem = None
    for path in _step_folders(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            problem = problem or error
        else:
            return path
    if problem is not None:
        raise problem
    return None


def write_manifest(folder: Path) -> None:
    """Write a manifest into a folder, with the size and SHA-256 of each of its files but the model card.

    The card is text for people, which its owner may edit.
    """
    files = {
        path.relative_to(folder).as_posix(): _describe(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MODEL_CARD
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: naming the file.
    """
    _verify(path, needed={WEIGHTS, MOMENTS, STATE}, remedy="use another checkpoint")


def verify_model(path: Path) -> None:
    """Compare every file of a model's folder with its manifest, if it has one; the models that runs write have one.

    Raises:
        CheckpointError: naming the file.
    """
    if (path / MANIFEST).exists():
        remedy = f"use another checkpoint; if the change is yours, remove {MANIFEST}"
        _verify(path, needed={CONFIG}, remedy=remedy)


def _verify(path: Path, *, needed: set[str], remedy: str) -> None:
    manifest_path = path / MANIFEST
    try:
        if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        manifest = json.loads(manifest_path.read_text())
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
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(str(file), expected=f"{size} bytes", found="no file", remedy=remedy)
        actual = _describe(file)
        if actual["bytes"] != size:
            raise CheckpointError(str(file), expected=f"{size} bytes", found=f"{actual['bytes']} bytes", remedy=remedy)
        if actual["sha256"] != sha256:
            raise CheckpointError(str(file), expected=f"SHA-256 {sha256}", found=str(actual["sha256"]), remedy=remedy)


def read_state(path: Path) -> TrainingState:
    """Return the training state of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, or is not a state that this version can read.
    """
    try:
        return TrainingState(**json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            str(path / STATE), expected="a training state", found=str(error), remedy="use another checkpoint"
        ) from None


def load_checkpoint(path: Path, model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and moments to the bit.

    Raises:
        CheckpointError: if names, shapes or dtypes are not those of `model`.
    """
    tensors = _fitting_weights(path, model)
    moments = _load_tensors(path / MOMENTS)
    # AdamW makes moments at a parameter's first step, so a parameter that was never stepped has none
    parameters = {name: p for name, p in model.named_parameters() if f"{MOMENT_KINDS[0]}/{name}" in moments}
    steps = torch.zeros(())
    expected = {
        f"{kind}/{name}": steps if kind == "step" else parameter
        for name, parameter in parameters.items()
        for kind in MOMENT_KINDS
    }
    _check_tensors(path / MOMENTS, expected, moments)
    model.load_state_dict(tensors, strict=False)  # tied weights are stored once
    for name, parameter in parameters.items():
        # fused AdamW keeps its step beside the parameter
        optimizer.state[parameter] = {kind: moments[f"{kind}/{name}"].to(parameter.device) for kind in MOMENT_KINDS}


def load_weights(path: Path, model: MetaTokenForCausalLM) -> None:
    """Load the weights of a checkpoint or model folder into `model`, to the bit.

    Raises:
        CheckpointError: if names, shapes or dtypes are not those of `model`.
    """
    model.load_state_dict(_fitting_weights(path, model), strict=False)  # tied weights are stored once


def _fitting_weights(path: Path, model: MetaTokenForCausalLM) -> dict[str, Tensor]:
    tensors = _load_tensors(path / WEIGHTS)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in (model._tied_weights_keys or {})}
    _check_tensors(path / WEIGHTS, own, tensors)
    return tensors


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            str(path), expected="a safetensors file", found=str(error), remedy="use another checkpoint"
        ) from None


def _check_tensors(file: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    remedy = "use a checkpoint of this config"
    for name in sorted(expected.keys() ^ found.keys()):
        where = "in the model only" if name in expected else "in the file only"
        raise CheckpointError(str(file), expected="the model's tensors", found=f"{name} {where}", remedy=remedy)
    for name, tensor in expected.items():
        if (tensor.shape, tensor.dtype) != (found[name].shape, found[name].dtype):
            raise CheckpointError(
                f"{file}: {name}",
                expected=f"{tuple(tensor.shape)} {tensor.dtype}",
                found=f"{tuple(found[name].shape)} {found[name].dtype}",
                remedy=remedy,
            )


def _optimizer_tensors(model: MetaTokenForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }


def _step_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first; none if `folder` does not exist yet."""
    return sorted((path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)), reverse=True)


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
