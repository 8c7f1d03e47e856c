"""The contenders of analysis: one function each, a way to look at every attention row of a forward pass.

Each takes a lens, ids (1, T) and which of them are meta-tokens, (1, T) bool, and returns the mean entropy of the rows
that it looked at, in nats, or None.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metatokens.analysis.attention.rows import StratifiedQueries, row_statistics
from metatokens.analysis.attention.sharpening import attention_effects
from metatokens.analysis.inputs.documents import Document
from metatokens.bench.measuring import Registry
from metatokens.lens import Lens
from metatokens.lens.lens import AttentionCall

ANALYSIS = Registry()
QUERIES = StratifiedQueries(512)
Look = Callable[[Lens, Tensor, Tensor], float | None]


@ANALYSIS.add()
def forward(lens: Lens, ids: Tensor, is_meta: Tensor) -> None:
    """The forward pass alone."""
    del is_meta
    lens.run(ids)


@ANALYSIS.add()
def sampled(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    """Entropy and meta mass of 512 sampled queries, exact for each of them, and of all rows of meta-attention."""
    return _mean_entropy(lens, ids, is_meta, QUERIES.draw(ids.shape[1]))


@ANALYSIS.add()
def blocks(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    """The same of all queries."""
    return _mean_entropy(lens, ids, is_meta)


@ANALYSIS.add()
def two_runs(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    """`attention_effects` of 512 sampled queries: with the embedding and without, and the theorem's audit."""
    document = Document("random tokens", ids, is_meta)
    return float(attention_effects(lens, [document], queries=QUERIES)["entropy"].mean())


@ANALYSIS.add()
def stored(lens: Lens, ids: Tensor, is_meta: Tensor) -> float:
    """All attention weights kept (`output_attentions`), then entropy and meta mass."""
    options = {"output_attentions": True, "output_meta_attentions": True, "use_cache": False, "logits_to_keep": 1}
    output = lens(ids, **options)
    entropies = [torch.special.entr(weights).sum(-1) for weights in output.attentions]
    for weights in output.attentions:
        (weights * is_meta[:, None, None]).sum(-1)
    for weights in output.meta_attentions:
        torch.special.entr(weights).sum(-1)
    return float(torch.stack(entropies).mean())


def _mean_entropy(lens: Lens, ids: Tensor, is_meta: Tensor, rows: Tensor | None = None) -> float:
    entropies = []

    def look(call: AttentionCall) -> None:
        if call.branch == "attn":
            entropies.append(row_statistics(call, is_meta=is_meta, rows=rows).entropy)
        else:  # whose keys are all meta-tokens
            row_statistics(call, is_meta=call.columns >= 0)

    with lens.observe(look):
        lens.run(ids)
    return float(torch.stack(entropies).mean())
