"""What attention rows look like, exactly, without ever storing one: entropy, mass on meta-tokens, log-odds.

All logarithms are natural, so entropies are in nats. With scores s of a row over its visible keys, S the meta keys
among them and C the others,

    entropy            H = LSE - E[s]             LSE = ln sum e^s, E under the softmax
    meta mass          P = sum over S of the weights
    meta log-odds      ln P / (1 - P) = LSE_S - LSE_C
    chain rule         H = h(P) + P H_S + (1 - P) H_C

A row is known from its two sets by the chain rule. No term of that sum is negative, so a set of next to no weight has
its entropy and its odds as exactly as the other. Queries and keys are taken as the model used them, after rotation, and
scores are made in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from metatokens.baselines.landmark import LandmarkConfig
from metatokens.errors import UsageError
from metatokens.lens.lens import AttentionCall, Lens

SINK_LEAVES = 1e-2
"""With less than this beside the sink, the entropy of the rest is lost to rounding."""


@dataclass(frozen=True)
class RowStatistics:
    """Of each attention row, (B, H, Q) each; NaN where a row has no key of the set, as padding may."""

    entropy: Tensor
    """H, nats."""
    meta_mass: Tensor
    """P, 0 without a meta key."""
    meta_log_odds: Tensor
    """ln P / (1 - P); minus infinity without a meta key, plus infinity without another."""
    sink_mass: Tensor
    """Weight of the first visible key."""
    num_keys: Tensor
    """Visible keys, (B, 1, Q)."""
    num_meta_keys: Tensor
    """Meta keys among them, (B, 1, Q)."""
    max_score: Tensor
    """Largest score of the row; a common shift of all scores moves it and no weight."""

    @property
    def effective_keys(self) -> Tensor:
        """e^H: over how many keys a uniform row would have this entropy."""
        return torch.exp(self.entropy)

    @property
    def entropy_without_sink(self) -> Tensor:
        """Entropy of the row without its first key, by the chain rule."""
        rest = 1 - self.sink_mass
        return torch.where(rest > SINK_LEAVES, (self.entropy - binary_entropy(self.sink_mass, rest)) / rest, torch.nan)

    @property
    def meta_lift(self) -> Tensor:
        """Mass on meta keys over their share of the visible keys; NaN without a meta key."""
        return torch.where(
            self.num_meta_keys > 0, self.meta_mass * self.num_keys / self.num_meta_keys.clamp(min=1), torch.nan
        )


def binary_entropy(share: Tensor, rest: Tensor) -> Tensor:
    """Return h(p) = -p ln p - (1 - p) ln(1 - p) of p and 1 - p, nats; 0 at both ends."""
    entropy: Tensor = torch.special.entr(share) + torch.special.entr(rest)
    return entropy


def row_statistics(call: AttentionCall, *, is_meta: Tensor, rows: Tensor | None = None) -> RowStatistics:
    """Return the statistics of attention rows, block of queries by block of queries.

    Args:
        call: The attention.
        is_meta: (B or 1, T) bool, True at meta keys.
        rows: (Q,) rising indices of the queries to look at; None takes all.
    """
    num_rows = call.query_BHTD.shape[-2] if rows is None else len(rows)
    # filled in place: results allocated between blocks would pin the freed blocks' memory
    filled: dict[str, Tensor] = {}
    is_meta = is_meta.expand(len(call.query_BHTD), -1)
    start = 0
    for scores, visible, chosen in call.score_blocks(rows=rows):
        block = _block_statistics(scores, visible, is_meta[:, None, None, : scores.shape[-1]])
        for field in fields(RowStatistics):
            part: Tensor = getattr(block, field.name)
            if not start:
                filled[field.name] = part.new_empty((*part.shape[:-1], num_rows))
            filled[field.name][..., start : start + len(chosen)] = part
        start += len(chosen)
    return RowStatistics(**filled)


@dataclass(frozen=True)
class StratifiedQueries:
    """A sample of the queries of a sequence: one drawn from each of `count` equally long stretches."""

    count: int = 512
    seed: int = 0

    def draw(self, num_tokens: int) -> Tensor:
        """Return rising indices (at most `count`,) of queries."""
        if num_tokens <= self.count:
            return torch.arange(num_tokens)
        edges = torch.linspace(0, num_tokens, self.count + 1, dtype=torch.float64).long()
        generator = torch.Generator().manual_seed(self.seed)
        widths = edges.diff()
        return edges[:-1] + (torch.rand(self.count, generator=generator, dtype=torch.float64) * widths).long()


def observe_attention(lens: Lens, input_ids: Tensor, look: Callable[[AttentionCall], None]) -> None:
    """Run a model, and hand the self-attention of each layer to a function as it runs, so that none is stored.

    Raises:
        UsageError: A model whose attention is no softmax of its scores.
    """
    check_plain_softmax(lens)
    with lens.observe(lambda call: look(call) if call.branch == "attn" else None):
        lens.run(input_ids)


def attention_weights(call: AttentionCall, heads: slice = slice(None)) -> Tensor:
    """Return the weights (n, T, T) of some heads of the one text of a call, float32; a row that sees no key is 0."""
    _, num_heads, num_tokens, _ = call.query_BHTD.shape
    ((scores, visible, _),) = call.score_blocks(heads=heads, block_scores=num_heads * num_tokens**2)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)[0]


def weights_of_both_branches(lens: Lens, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of self-attention and of meta-attention of one text, (L, H, T, T) each, float32 or better.

    Rows are queries. Meta-attention is 0 in layers without it, and at tokens that take no part in it.

    Args:
        lens: On the model.
        input_ids: (T,) with meta-tokens.

    Raises:
        UsageError: A model whose attention is no softmax of its scores.
    """
    check_plain_softmax(lens)
    sites = [site for block in lens.layout.blocks for site in block.attentions]
    shape = len(lens.layout.blocks), sites[0].num_heads, len(input_ids), len(input_ids)
    dtype = torch.promote_types(lens.model.dtype, torch.float32)
    weights = {branch: torch.zeros(shape, dtype=dtype) for branch in ("attn", "meta_attn")}

    def keep(call: AttentionCall) -> None:
        columns = call.columns[0]
        weights[call.branch][call.layer][:, columns[:, None].cpu(), columns.cpu()] = attention_weights(call).cpu()

    with lens.observe(keep):
        lens.run(input_ids[None])
    return weights["attn"], weights["meta_attn"]


def check_plain_softmax(lens: Lens) -> None:
    """Raise UsageError for a model whose attention weights are not the softmax of its scores."""
    if isinstance(lens.model.config, LandmarkConfig):
        raise UsageError(
            "attention statistics",
            expected="weights that are the softmax of the scores",
            found="Landmark Attention's grouped softmax",
            remedy="take a model without landmarks",
        )


def _block_statistics(scores: Tensor, visible: Tensor, is_meta: Tensor) -> RowStatistics:
    """Return the statistics of rows from those of their two sets of keys; `is_meta` is (B or 1, 1, 1, K)."""
    meta = visible & is_meta
    seen = visible.expand(meta.shape)
    num_keys = seen.sum(-1)
    has_keys = num_keys > 0
    of_meta = is_meta.reshape(-1, is_meta.shape[-1]).any(0)  # few columns, which alone are looked at
    meta_lse, meta_entropy, meta_largest = softmax_over(scores[..., of_meta], meta[..., of_meta])
    text_lse, text_entropy, text_largest = softmax_over(scores, seen & ~meta)
    log_odds = meta_lse - text_lse
    mass, rest = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    # a set without keys has no entropy, and no weight
    within = torch.where(mass > 0, mass * meta_entropy, 0) + torch.where(rest > 0, rest * text_entropy, 0)
    first = seen.int().argmax(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    sink = (scores.gather(-1, first)[..., 0] - torch.logaddexp(meta_lse, text_lse)).exp()
    return RowStatistics(
        entropy=torch.where(has_keys, binary_entropy(mass, rest) + within, torch.nan),
        meta_mass=mass,
        meta_log_odds=log_odds,
        sink_mass=torch.where(has_keys, sink, torch.nan),
        num_keys=num_keys,
        num_meta_keys=meta.sum(-1),
        max_score=torch.maximum(meta_largest, text_largest),
    )


def softmax_over(scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ln Z, H and the largest score of each row (..., Q) over some keys.

    Args:
        scores: (..., Q, K).
        keys: (..., Q, K) bool, True at the keys that count.

    Returns:
        Minus infinity, NaN and minus infinity where a row has none.
    """
    if not scores.shape[-1]:
        none = scores.new_full(scores.shape[:-1], -torch.inf)
        return none, torch.full_like(none, torch.nan), none
    kept = torch.where(keys, scores, -torch.inf)
    largest = kept.amax(-1)
    shifted = kept.sub_(torch.where(largest.isfinite(), largest, 0)[..., None])
    weights = shifted.exp()
    norm = weights.sum(-1)
    # H = ln Z' + U / Z' of the shifted scores: neither term is negative
    mean = weights.mul_(shifted.masked_fill_(~keys, 0)).sum(-1) / norm
    return largest + norm.log(), norm.log() - mean, largest
