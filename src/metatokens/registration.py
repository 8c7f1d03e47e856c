"""Registers the models and their pipeline task with transformers, without importing torch before it is needed.

`import metatokens` must stay light, yet `AutoModelForCausalLM.from_pretrained` must know the models afterwards, and
`pipeline` the task. So each registration waits until transformers imports its auto classes or its pipelines; if it has
done so already, the registration runs now.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"
LAYERS_MODULE = "transformers.modeling_layers"
PIPELINES_MODULE = "transformers.pipelines"
REGISTERED_WITH = {
    AUTO_MODULE: ("metatokens.model", "metatokens.baselines"),
    PIPELINES_MODULE: ("metatokens.generation.pipeline",),
}
"""For each module of transformers, what of this package registers itself with it when it is imported."""


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules that a registration waits for as usual, and registers once they are complete.

    The models also need transformers' `modeling_layers`, which imports the auto module itself. If it is imported first
    (as by `from transformers import GPT2LMHeadModel`), the models wait until it is complete too.
    """

    def __init__(self) -> None:
        self.num_running = 0
        self.waiting = dict(REGISTERED_WITH)

    def register(self) -> None:
        """Import what waits for modules that are imported, unless an import that it may need is still running."""
        while not self.num_running and (ready := [module for module in self.waiting if module in sys.modules]):
            self.num_running += 1
            try:
                for name in self.waiting.pop(ready[0]):
                    importlib.import_module(name)
            finally:
                self.num_running -= 1
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (AUTO_MODULE, LAYERS_MODULE, PIPELINES_MODULE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Runs a module's own loader, then registers what waited for it."""

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
        self._finder.register()


def register_with_transformers() -> None:
    """Register models and pipeline task now, or as soon as transformers imports what they are registered with."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        finder = _RegisterAfterImport()
        sys.meta_path.insert(0, finder)
        finder.register()
