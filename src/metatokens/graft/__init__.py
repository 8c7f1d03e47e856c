"""Meta-tokens and memory mode for a decoder of transformers that was trained without them.

`graft` changes a model in place, by hooks alone: it goes on taking and returning text, and puts the anchors between the
tokens by itself. `families.py` has one entry for each architecture, `spreading.py` where the anchors stand and who sees
whom, `grafting.py` the hooks, `attending.py` the attention of long passes, `cache.py` what stays in the cache,
`saving.py` and `loading.py` the files, `bundle.py` the code that travels with them. For training, `objectives` has what
the new parts learn from, one function in one file each, `student.py` the model under the call of the training loop, and
`costs.py` what a step takes.
"""

from metatokens.config.graft import GraftConfig
from metatokens.graft.grafting import Graft, enable_gradient_checkpointing, graft, switched_off, ungraft
from metatokens.graft.loading import load_graft
from metatokens.graft.saving import save_graft

__all__ = [
    "Graft",
    "GraftConfig",
    "enable_gradient_checkpointing",
    "graft",
    "load_graft",
    "save_graft",
    "switched_off",
    "ungraft",
]
