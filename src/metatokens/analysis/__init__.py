"""Take a model apart: what it computes at its meta-tokens, and what follows from it.

Measures have short ids, such as A8 or E2; docs/guide/analysis.md has the table of them.

Public names are imported on first use, so that importing this package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metatokens.analysis import ops as ops
    from metatokens.analysis.causal import block_paths as block_paths
    from metatokens.analysis.causal import interchange as interchange
    from metatokens.analysis.causal import knock_out_meta_attention as knock_out_meta_attention
    from metatokens.analysis.causal import knock_out_on_text as knock_out_on_text
    from metatokens.analysis.eviction import evict as evict
    from metatokens.analysis.eviction import measure_eviction as measure_eviction
    from metatokens.analysis.eviction import measure_recall_after_eviction as measure_recall_after_eviction
    from metatokens.analysis.lens import Lens as Lens
    from metatokens.analysis.minimal_pairs import MinimalPair as MinimalPair
    from metatokens.analysis.minimal_pairs import make_minimal_pair as make_minimal_pair
    from metatokens.analysis.minimal_pairs import make_minimal_pairs as make_minimal_pairs

_HOMES = {
    "Lens": "metatokens.analysis.lens",
    "MinimalPair": "metatokens.analysis.minimal_pairs",
    "block_paths": "metatokens.analysis.causal",
    "evict": "metatokens.analysis.eviction",
    "interchange": "metatokens.analysis.causal",
    "knock_out_meta_attention": "metatokens.analysis.causal",
    "knock_out_on_text": "metatokens.analysis.causal",
    "make_minimal_pair": "metatokens.analysis.minimal_pairs",
    "make_minimal_pairs": "metatokens.analysis.minimal_pairs",
    "measure_eviction": "metatokens.analysis.eviction",
    "measure_recall_after_eviction": "metatokens.analysis.eviction",
}
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
