"""Registers the models with transformers' Auto classes without importing torch before it is needed.

`import metatokens` must stay light, yet `AutoModelForCausalLM.from_pretrained` must know the models afterwards. So the
registration waits until transformers imports its auto classes; if it has done so already, the registration runs now.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"
LAYERS_MODULE = "transformers.modeling_layers"
MODEL_PACKAGES = ("metatokens.model", "metatokens.baselines")


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the auto module as usual, and has the models imported once it is complete.

    The models also need transformers' `modeling_layers`, which imports the auto module itself. If it is imported first
    (as by `from transformers import GPT2LMHeadModel`), the models wait until it is complete too.
    """

    def __init__(self) -> None:
        self.num_running = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (AUTO_MODULE, LAYERS_MODULE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImportModels(spec.loader, self)
        return spec


class _ThenImportModels(importlib.abc.Loader):
    """Runs a module's own loader, then imports the models."""

    def __init__(self, loader: importlib.abc.Loader, finder: _RegisterAfterImport) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._finder.num_running += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.num_running -= 1
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if not self._finder.num_running and AUTO_MODULE in sys.modules and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _import_models()


def register_with_transformers() -> None:
    """Register the models with the Auto classes now, or as soon as transformers imports them."""
    if AUTO_MODULE in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _import_models() -> None:
    for package in MODEL_PACKAGES:
        importlib.import_module(package)
