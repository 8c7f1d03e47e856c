"""What transformers calls to open a full folder of a graft with its code: the plain base, then the graft onto it.

AutoModelForCausalLM.from_pretrained(folder)                            # the plain base
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)    # grafted, with or without `metatokens`

A copy of this file and of all that it imports lies beside the weights (`bundle.py`).
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

from metatokens.config.graft import GRAFT_FILE
from metatokens.errors import UsageError

_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")


class GraftedForCausalLM:
    """Opens a folder or a repository of the hub; the model is of the base's class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the model's class is one of transformers."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **options: Any) -> Any:
        """Return the grafted model, in evaluation mode; the arguments are those of transformers."""
        model = AutoModelForCausalLM.from_pretrained(name, *args, **{**options, "trust_remote_code": False})
        vars(model.config).pop("auto_map", None)  # what is saved of the model has no code beside it
        folder = Path(name)
        if not folder.is_dir():
            given = {key: options[key] for key in _OF_THE_HUB if key in options}
            folder = Path(hf_hub_download(name, GRAFT_FILE, **given)).parent
        return _loader()(folder, model)


def _loader() -> Callable[[Path, Any], Any]:
    """Return the package's own function where it is imported, so that its other parts know the model's cache."""
    if sys.modules.get("metatokens") is not None:
        of_package: Callable[[Path, Any], Any] = importlib.import_module("metatokens.graft.loading").load_graft
        return of_package
    return _load_with_own_code


def _load_with_own_code(folder: Path, model: Any) -> Any:
    # here and not above: a cache that is imported takes the place of the package's with transformers
    from metatokens.graft.loading import load_graft

    model = load_graft(folder, model)
    model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*args: Any, **options: Any) -> NoReturn:
    del args, options
    raise UsageError(
        "save_pretrained of a grafted model",
        expected="save_graft of the package metatokens",
        found="the code beside a checkpoint, which only opens one",
        remedy="install metatokens, or copy the folder",
    )
