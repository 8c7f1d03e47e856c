"""Exporting: it writes a model, whose weights may lie in parts, as one folder for `from_pretrained`."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from metatokens.data.tokenizer import build_hf_tokenizer
from metatokens.errors import UsageError
from metatokens.graft.saving import write_graft
from metatokens.model.export import save_model
from metatokens.storage import LEAST_BYTES, check_folder, new_folder
from metatokens.training.checkpoint import MODEL_CARD, write_manifest
from metatokens.training.loading import ModelFolder
from metatokens.training.model_card import Training, write_model_card

_BYTES_PER_PARAMETER = 4  # models are saved in float32


def export_model(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the model of a run, model or checkpoint folder, of either kind, into the new folder `out`.

    Returns:
        What was written, for a report.

    Raises:
        UsageError: if `out` exists or cannot be written.
        ResourceError: if the disk has no room for the model.
        CheckpointError: if there is no model or it does not load.
    """
    folder = ModelFolder(checkpoint)
    model = folder.open_model()
    made = Training("export", base_model=str(checkpoint))
    card = folder.path / MODEL_CARD
    if folder.is_grafted:
        _check_new(model, out)
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as unfinished:
            write_graft(model.wrapped, unfinished, full=True, tokenizer=tokenizer)
            write_manifest(unfinished)
        return {"model": str(out), "num_parameters": model.num_parameters()}
    write_new_model(model, out, build_hf_tokenizer(folder.tokenizer), made=made, card=card if card.is_file() else None)
    return {"model": str(out), "num_parameters": model.num_parameters()}


def write_new_model(
    model: Any, out: Path, tokenizer: Any, *, made: Training, card: Path | None = None, dry_run: bool = False
) -> None:
    """Write a model with its manifest and card, a new one or a copy, into the new folder `out`; a dry run only checks.

    Raises:
        UsageError: if `out` exists or cannot be written.
        ResourceError: if the disk has no room for the model.
    """
    _check_new(model, out)
    if not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as folder:
            save_model(model, folder, tokenizer)
            if card is not None:
                shutil.copyfile(card, folder / MODEL_CARD)
            write_model_card(folder, model, made, name=out.name)
            write_manifest(folder)


def _check_new(model: Any, out: Path) -> None:
    """Refuse a place that is taken, or has no room for the model."""
    if os.path.lexists(out):  # a broken link counts too
        raise UsageError(str(out), expected="a new folder", found="something there", remedy="choose another --out")
    check_folder(out, num_bytes=LEAST_BYTES + _BYTES_PER_PARAMETER * model.num_parameters())
