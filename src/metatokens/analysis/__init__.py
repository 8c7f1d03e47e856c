"""Take a model apart: what it computes at its meta-tokens, and what follows from it.

Public names are imported on first use, so that importing this package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metatokens.analysis import ops as ops
    from metatokens.analysis.lens import Lens as Lens

_HOMES = {"Lens": "metatokens.analysis.lens"}
_MODULES = ("ops",)
__all__ = [*sorted(_HOMES), *_MODULES]  # noqa: PLE0604 - every name is a string


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"metatokens.analysis.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'metatokens.analysis' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
