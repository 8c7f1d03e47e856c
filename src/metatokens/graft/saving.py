"""Files of a graft: an adapter, which names its base, or a folder that is the base and has the adapter beside it.

`graft.safetensors` holds the new parameters, and in its header the config of the graft and what it was grafted onto.
A full folder is an ordinary folder of transformers with this file in it, so `AutoModelForCausalLM` opens it as the
plain base, with or without this package; with `trust_remote_code` it opens it grafted, by the code beside the weights,
which needs the package.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from metatokens.config.graft import GRAFT_FILE, GraftConfig
from metatokens.errors import CheckpointError, UsageError
from metatokens.graft.grafting import NAME, graft, graft_of, ungraft
from metatokens.storage import new_folder, write_durably

CODE = Path(__file__).with_name("modeling_graft.py")
FORMAT = "graft of metatokens 1"


def save_graft(model: Any, folder: str | Path, *, full: bool = False, tokenizer: Any = None) -> None:
    """Write the graft of a model into a new folder, complete or absent.

    An adapter has the config of its base beside it, from which the commands of this package know what it is.

    Args:
        model: a grafted model.
        folder: must not exist.
        full: write the base too, whose weights are as they came.
        tokenizer: of transformers, written too if given.

    Raises:
        UsageError: the model has no graft, PEFT has changed its modules, or the folder exists.
        ResourceError: the folder cannot be written.
    """
    folder, added = Path(folder), graft_of(model)
    if folder.exists():
        raise UsageError(str(folder), expected="a new folder", found="one that exists", remedy="name another folder")
    if any(".base_layer." in name for name in model.state_dict()):
        raise UsageError(
            type(model).__name__,
            expected="the modules that were grafted",
            found="adapters of PEFT in them",
            remedy="save the graft before, or take them off with unload()",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as unfinished:
        write_adapter(unfinished, added.state_dict(), added.config, describe_base(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        if not full:
            model.config.save_pretrained(unfinished)
        else:
            del model._modules[NAME]
            own_map = getattr(model.config, "auto_map", None)
            model.config.auto_map = {"AutoModelForCausalLM": f"{CODE.stem}.GraftedForCausalLM"}
            try:
                model.save_pretrained(unfinished)
            finally:
                model.add_module(NAME, added)
                model.config.auto_map = own_map
            shutil.copyfile(CODE, unfinished / CODE.name)


def describe_base(model: Any, name: str = "") -> dict[str, str]:
    """Return what an adapter says of the model that it was grafted onto; the digest reads all of its weights.

    Args:
        model: plain or grafted.
        name: a folder or an id of the hub; empty means the one that the model was loaded by.
    """
    return {
        "base": name or str(model.config._name_or_path),
        "revision": str(getattr(model.config, "_commit_hash", None) or ""),
        "digest": base_digest(model),
    }


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: GraftConfig, base: Mapping[str, str]) -> None:
    """Write the file of a graft into a folder.

    Args:
        folder: must exist.
        tensors: the state of a `Graft`.
        config: of the graft.
        base: from `describe_base`.
    """
    header = {"format": FORMAT, "config": config.model_dump_json(), **base}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_durably(folder / GRAFT_FILE, save(whole, header))


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
    graft(model, GraftConfig.model_validate_json(header["config"]))
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
        GraftConfig.model_validate_json(header["config"])
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
