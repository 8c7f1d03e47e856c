"""Opens what `saving.py` has written: a graft on its base, or a folder that holds both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from metatokens.config.graft import GRAFT_FILE, GraftConfig
from metatokens.errors import CheckpointError
from metatokens.graft.grafting import NAME, graft, graft_of, ungraft

FORMAT = "graft of metatokens 1"


def load_graft(folder: str | Path, model: Any = None) -> Any:
    """Return a grafted model, in evaluation mode.

    Args:
        folder: written by `save_graft`.
        model: the plain base, in place; None opens the folder's own, or the one that the adapter names.

    Raises:
        CheckpointError: the folder holds no graft, a damaged one, or one of another base.
        UsageError: the model cannot be grafted.
    """
    folder = Path(folder)
    header, tensors = _read(folder / GRAFT_FILE)
    if model is None:
        own = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
        source, revision = (str(folder), None) if own else (header["base"], header["revision"] or None)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=revision or "main", use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                str(folder),
                expected=f"its base {source or 'without a name'}",
                found=str(error).split("\n", maxsplit=1)[0],
                remedy="open the base yourself and give it as model",
            ) from None
    if (digest := base_digest(model)) != header["digest"]:
        raise CheckpointError(
            str(folder),
            expected=f"its base {header['base']} with the digest {header['digest'][:12]}",
            found=f"another model, {model.config._name_or_path}, with {digest[:12]}",
            remedy="give the model that was grafted",
        )
    graft(model, GraftConfig.read(json.loads(header["config"])))
    try:
        graft_of(model).load_state_dict(tensors)
    except RuntimeError as error:
        ungraft(model)
        raise _damaged(folder / GRAFT_FILE, error) from None
    return model.eval()


def base_digest(model: Any) -> str:
    """Return the SHA-256 of the weights of the base, rounded to bfloat16: the type that it is loaded in does not count.

    Two bases that differ by less than this rounding everywhere are taken for one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(f"{NAME}."):
            continue
        rounded = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(rounded.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
        if header.get("format") != FORMAT:
            raise ValueError(f"the format {header.get('format')!r}")
        GraftConfig.read(json.loads(header["config"]))
        missing = {"base", "revision", "digest"} - header.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None
    return header, tensors


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        str(file), expected=f"a {FORMAT.rpartition(' ')[0]}", found=str(error), remedy="save it anew with save_graft"
    )
