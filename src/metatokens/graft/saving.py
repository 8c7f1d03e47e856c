"""Files of a graft: an adapter, which names its base, or a folder that is the base and has the adapter beside it.

`graft.safetensors` holds the new parameters, and in its header the config of the graft and what it was grafted onto.
A full folder is an ordinary folder of transformers with this file in it, so `AutoModelForCausalLM` opens it as the
plain base, with or without this package; with `trust_remote_code` it opens it grafted, by the code beside the weights
(`bundle.py`). `loading.py` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from metatokens.config.graft import GRAFT_FILE, GraftConfig
from metatokens.errors import UsageError
from metatokens.graft.bundle import ENTRY, flat_code, flat_name
from metatokens.graft.grafting import NAME, graft_of
from metatokens.graft.loading import FORMAT, base_digest
from metatokens.storage import new_folder, write_durably


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
    folder = Path(folder)
    graft_of(model)
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
        write_graft(model, unfinished, full=full, tokenizer=tokenizer)


def write_graft(model: Any, folder: Path, *, full: bool, tokenizer: Any = None) -> None:
    """Write what `save_graft` does into an empty folder."""
    added = graft_of(model)
    write_adapter(folder, added.state_dict(), added.config, describe_base(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not full:
        model.config.save_pretrained(folder)
        return
    for name, text in flat_code().items():
        (folder / name).write_text(text, encoding="utf-8")
    del model._modules[NAME]
    own_map = getattr(model.config, "auto_map", None)
    model.config.auto_map = {"AutoModelForCausalLM": f"{flat_name(ENTRY)}.GraftedForCausalLM"}
    try:
        # a model that was opened by the code beside its weights refuses its own method
        PreTrainedModel.save_pretrained(model, folder)
    finally:
        model.add_module(NAME, added)
        del model.config.auto_map
        if own_map is not None:
            model.config.auto_map = own_map


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
    header = {"format": FORMAT, "config": json.dumps(asdict(config)), **base}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_durably(folder / GRAFT_FILE, save(whole, header))
