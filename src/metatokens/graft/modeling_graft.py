"""The code of a full folder of a graft: a copy of it lies beside the weights and opens them grafted, with the package.

AutoModelForCausalLM.from_pretrained(folder)                            # the plain base
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)    # grafted, by the package `metatokens`
"""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

from metatokens.graft import load_graft


class GraftedForCausalLM:
    """Opens a folder or a repository of the hub; the model is of the base's class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the model's class is one of transformers."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **options: Any) -> Any:
        """Return the grafted model, in evaluation mode; the arguments are those of transformers."""
        model = AutoModelForCausalLM.from_pretrained(name, *args, **{**options, "trust_remote_code": False})
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(hf_hub_download(name, "graft.safetensors", revision=options.get("revision"))).parent
        return load_graft(folder, model)
