"""Registers the models with transformers' Auto classes without importing torch before it is needed.

`import metatokens` must stay light, yet `AutoModelForCausalLM.from_pretrained` must know the model afterwards. So the
registration waits for the import of transformers' auto classes; where that has happened already, it runs at once.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"
MODEL_PACKAGES = ("metatokens.model", "metatokens.baselines")


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the auto module as usual, once, and imports the model after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenImportModel(spec.loader)
        return spec


class _ThenImportModel(importlib.abc.Loader):
    """The module's own loader, followed by the import of the model."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _import_models()


def register_with_transformers() -> None:
    """Register the model with the Auto classes now, or as soon as transformers imports them."""
    if AUTO_MODULE in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _import_models() -> None:
    for package in MODEL_PACKAGES:
        importlib.import_module(package)
