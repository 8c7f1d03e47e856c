"""What attention rows look like, exactly, without ever storing one: entropy, mass on meta-tokens, log-odds, distance.

All logarithms are natural, so entropies are in nats. With scores s of a row over its visible keys, S the meta keys
among them and C the others,

    entropy            H = LSE - E[s]             LSE = ln sum e^s, E under the softmax
    meta mass          P = sum over S of the weights
    meta log-odds      ln P / (1 - P) = LSE_S - LSE_C
    chain rule         H = h(P) + P H_S + (1 - P) H_C

Two paths give the same numbers, and a test says so. `row_statistics` takes blocks of queries with all their keys:
obvious, any mask, any statistic. `fused_statistics` asks the fused causal kernel with the keys in place of the values,
which is faster on long sequences; where P is within 0.01 of 0 or 1 its subtractions cancel, and the rows are done again
by the first path. Queries and keys are taken as the model used them, after rotation, in float32: in bfloat16
the second path would be wrong by up to 0.15 nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from metatokens.analysis.layout import Branch
from metatokens.analysis.lens import AttentionCall, Lens
from metatokens.baselines.landmark import LandmarkConfig
from metatokens.errors import UsageError

BLOCK_SCORES = 2**22
"""Scores at a time, at most, but for a single row: 16 MB."""
CANCELLATION = 1e-2
"""Below this share of either set the fused path loses the smaller one to rounding."""
SELF_CHECK_TOKENS = 64
SELF_CHECK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class RowStatistics:
    """Of each attention row, float32, (B, H, Q) each; NaN where a row has no key of the set."""

    entropy: Tensor
    """H, nats."""
    log_sum_exp: Tensor
    mean_score: Tensor
    """E[s] under the softmax."""
    meta_mass: Tensor
    """P, 0 without a meta key."""
    meta_log_odds: Tensor
    """ln P / (1 - P); minus infinity without a meta key, plus infinity without another."""
    meta_entropy: Tensor
    """H_S of the weights on meta keys alone."""
    text_entropy: Tensor
    """H_C of the weights on the others alone."""
    sink_mass: Tensor
    """Weight of the first visible key."""
    num_keys: Tensor
    """Visible keys, (B, 1, Q)."""
    num_meta_keys: Tensor
    """Meta keys among them, (B, 1, Q)."""
    max_score: Tensor | None = None
    """Largest score of the row; the fused path has none."""

    @property
    def effective_keys(self) -> Tensor:
        """e^H: over how many keys a uniform row would have this entropy."""
        return torch.exp(self.entropy)

    @property
    def normalised_entropy(self) -> Tensor:
        """H / ln(number of visible keys), NaN with a single one."""
        return torch.where(self.num_keys > 1, self.entropy / self.num_keys.float().log(), torch.nan)

    @property
    def entropy_without_sink(self) -> Tensor:
        """Entropy of the row without its first key, by the chain rule."""
        rest = 1 - self.sink_mass
        return torch.where(rest > CANCELLATION, (self.entropy - binary_entropy(self.sink_mass)) / rest, torch.nan)

    @property
    def meta_lift(self) -> Tensor:
        """Mass on meta keys over their share of the visible keys; NaN without a meta key."""
        return torch.where(
            self.num_meta_keys > 0, self.meta_mass * self.num_keys / self.num_meta_keys.clamp(min=1), torch.nan
        )


def binary_entropy(share: Tensor) -> Tensor:
    """Return h(p) = -p ln p - (1 - p) ln(1 - p), nats; 0 at both ends."""
    entropy: Tensor = torch.special.entr(share) + torch.special.entr(1 - share)
    return entropy


def row_statistics(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    *,
    scaling: float,
    is_meta: Tensor,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> RowStatistics:
    """Return the statistics of causal attention rows, block of queries by block of queries.

    Args:
        query_BHQD: (B, H, T, D) queries as the scores use them.
        key_BHKD: (B, H, T, D) keys.
        scaling: what products are multiplied by.
        is_meta: (B or 1, T) bool, True at meta keys.
        mask: None for plain causal attention, or (B or 1, 1 or H, T, T), bool (True = keep) or additive.
        rows: (Q,) indices of the queries to look at; None takes all.
    """
    num_rows = query_BHQD.shape[-2] if rows is None else len(rows)
    # filled in place: results allocated between blocks would pin the freed blocks' memory
    filled: dict[str, Tensor] = {}
    start = 0
    for scores, visible, chosen in _score_blocks(query_BHQD, key_BHKD, scaling=scaling, mask=mask, rows=rows):
        block = _block_statistics(scores, visible, is_meta)
        for field in fields(RowStatistics):
            part: Tensor = getattr(block, field.name)
            if not start:
                filled[field.name] = part.new_empty((*part.shape[:-1], num_rows))
            filled[field.name][..., start : start + len(chosen)] = part
        start += len(chosen)
    return RowStatistics(**filled)


def fused_statistics(query_BHTD: Tensor, key_BHTD: Tensor, *, scaling: float, is_meta: Tensor) -> RowStatistics:
    """Return the statistics of plain causal attention through the fused kernel; the arguments of `row_statistics`.

    The kernel gives LSE and, with the keys as values, E[k] and so E[s] = scaling q . E[k]. Keys are centred on their
    mean first, which shifts a row's scores alike and changes no weight.
    """
    query, key = query_BHTD.float(), key_BHTD.float()
    mean_key = key.mean(-2, keepdim=True)
    centred = key - mean_key
    shift = (query @ mean_key.transpose(-1, -2))[..., 0] * scaling
    meta = is_meta.expand(key.shape[0], -1)[:, None, :, None].to(key)
    marks = torch.zeros_like(key)
    marks[..., :1], marks[:, :, 0, 1] = meta, 1.0
    expected_key, lse = _fused(query, centred, centred, scaling)
    expected_meta_key, _ = _fused(query, centred, centred * meta, scaling)
    masses, _ = _fused(query, centred, marks, scaling)
    mass, sink = masses[..., 0].clamp(0, 1), masses[..., 1].clamp(0, 1)
    mean_score = (query * expected_key).sum(-1) * scaling
    meta_score = (query * expected_meta_key).sum(-1) * scaling
    entropy = (lse - mean_score).clamp(min=0)
    text_mass = 1 - mass
    num_keys, num_meta = _count_causal(is_meta.expand(key.shape[0], -1))
    meta_entropy = torch.where(num_meta > 0, lse + mass.log() - meta_score / mass, torch.nan)
    text_entropy = torch.where(
        num_meta < num_keys, lse + text_mass.log() - (mean_score - meta_score) / text_mass, torch.nan
    )
    statistics = RowStatistics(
        entropy=entropy,
        log_sum_exp=lse + shift,
        mean_score=mean_score + shift,
        meta_mass=mass,
        meta_log_odds=torch.where(num_meta > 0, torch.logit(mass), -torch.inf),
        meta_entropy=meta_entropy,
        text_entropy=text_entropy,
        sink_mass=sink,
        num_keys=num_keys,
        num_meta_keys=num_meta,
    )
    cancels = ((num_meta > 0) & ((mass < CANCELLATION) | (text_mass < CANCELLATION))).any(0).any(0)
    return _redo_rows(statistics, cancels.nonzero()[:, 0], query, key, scaling=scaling, is_meta=is_meta)


def distance_profile(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    *,
    scaling: float,
    is_meta: Tensor,
    columns: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the mean attention mass by distance, (2, B, H, bins): on other keys, and on meta keys.

    Bin 0 is the token itself, bin b > 0 the distances 2^(b-1) to 2^b - 1. Distances are counted in `columns` (B, T), by
    default 0..T-1; the other arguments are those of `row_statistics`.
    """
    batch, num_heads, num_tokens, _ = query_BHQD.shape
    places = torch.arange(num_tokens)[None] if columns is None else columns
    num_bins = 2 + int(math.log2(max(1, int(places.max()))))
    total = torch.zeros(2, batch, num_heads, num_bins, dtype=torch.float64)
    num_rows = 0
    meta = is_meta.expand(batch, -1)
    for scores, visible, chosen in _score_blocks(query_BHQD, key_BHKD, scaling=scaling, mask=mask, rows=rows):
        weights = torch.nan_to_num(torch.where(visible, scores, -torch.inf).softmax(-1)).double()
        distance = (places[:, chosen, None] - places[:, None, :]).clamp(min=0).expand(batch, -1, -1)
        bins = torch.where(distance > 0, 1 + torch.log2(distance.clamp(min=1).double()).long(), 0)
        for kind, keys in enumerate((~meta, meta)):
            kept = weights * keys[:, None, None, :]
            index = bins[:, None].expand_as(kept).flatten(2)
            total[kind] += torch.zeros(batch, num_heads, num_bins, dtype=torch.float64).scatter_add(
                2, index, kept.flatten(2)
            )
        num_rows += len(chosen)
    return total / num_rows


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


def attention_statistics(
    lens: Lens,
    input_ids: Tensor,
    *,
    is_meta: Tensor,
    branches: Sequence[Branch] = ("attn", "meta_attn"),
    queries: StratifiedQueries | None = None,
    **inputs: Tensor,
) -> dict[tuple[int, Branch], RowStatistics]:
    """Return the row statistics of every attention of a model, each computed as it runs, so that none is stored.

    Args:
        lens: of the model.
        input_ids: (B, T).
        is_meta: (B, T) bool, True at meta-tokens.
        branches: which attentions. Rows of "meta_attn" are its packed meta-tokens, all of whose keys are meta.
        queries: a sample of the queries of "attn", which then also have `max_score`; None takes all rows, through the
            fused kernel where the attention is plain.
        **inputs: of the model, such as `attention_mask`.

    Raises:
        UsageError: an attention that is no softmax of these scores, or a kernel that fails its check.
    """
    check_plain_softmax(lens)
    check_fused_kernel()
    found: dict[tuple[int, Branch], RowStatistics] = {}
    rows = None if queries is None else queries.draw(input_ids.shape[1])

    def look(call: AttentionCall) -> None:
        if call.branch not in branches:
            return
        keys_are_meta = members_of(call, is_meta)
        if call.branch == "attn" and call.mask is None and rows is None:
            found[call.layer, call.branch] = fused_statistics(
                call.query_BHTD, call.key_BHTD, scaling=call.scaling, is_meta=keys_are_meta
            )
        else:
            found[call.layer, call.branch] = row_statistics(
                call.query_BHTD,
                call.key_BHTD,
                scaling=call.scaling,
                is_meta=keys_are_meta,
                mask=mask_of(call),
                rows=rows if call.branch == "attn" else None,
            )

    with lens.observe(look):
        lens(input_ids, **inputs)
    return found


def members_of(call: AttentionCall, is_meta: Tensor) -> Tensor:
    """Return which keys of an attention are meta-tokens, (B, T) bool, from the whole sequence's mask."""
    if call.branch == "attn":
        return is_meta.expand(call.query_BHTD.shape[0], -1)
    return (call.columns >= 0) & is_meta.expand(call.columns.shape[0], -1).gather(1, call.columns.clamp(min=0))


def mask_of(call: AttentionCall) -> Tensor | None:
    """Return the mask of an attention as a tensor.

    Raises:
        UsageError: a backend whose masks are none.
    """
    if call.mask is None or isinstance(call.mask, Tensor):
        return call.mask
    raise UsageError(
        "attention implementation",
        expected="eager or sdpa, whose masks can be read",
        found=type(call.mask).__name__,
        remedy='call model.set_attn_implementation("sdpa")',
    )


def check_plain_softmax(lens: Lens) -> None:
    """Raise UsageError for a model whose attention weights are not the softmax of its scores."""
    if isinstance(lens.model.config, LandmarkConfig):
        raise UsageError(
            "attention statistics",
            expected="weights that are the softmax of the scores",
            found="Landmark Attention's grouped softmax",
            remedy="take a model without landmarks",
        )


def check_fused_kernel() -> None:
    """Compare the fused path with a dense float64 softmax on random rows.

    Raises:
        UsageError: They differ by more than 1e-4 nats; the kernel is an internal of torch.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, SELF_CHECK_TOKENS, 16, generator=generator) * 2 for _ in range(2))
    is_meta = torch.arange(SELF_CHECK_TOKENS)[None] % 7 == 3
    fused = fused_statistics(query, key, scaling=0.25, is_meta=is_meta)
    scores = (query.double() @ key.double().transpose(-1, -2)) * 0.25
    hidden = ~torch.ones(SELF_CHECK_TOKENS, SELF_CHECK_TOKENS, dtype=torch.bool).tril()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    error = float((torch.special.entr(weights).sum(-1) - fused.entropy).abs().max())
    if not error <= SELF_CHECK_TOLERANCE:
        raise UsageError(
            "fused attention kernel",
            expected=f"entropies within {SELF_CHECK_TOLERANCE} nats of a dense softmax",
            found=f"{error:.2g}",
            remedy="sample the queries (StratifiedQueries), which does without it",
        )


def _score_blocks(
    query: Tensor, key: Tensor, *, scaling: float, mask: Tensor | None, rows: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield scores (B, H, r, T) in float32 or better, which of them are visible, and the indices of the rows."""
    precise = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(precise), key.to(precise)
    columns = torch.arange(key.shape[-2])
    rows_at_a_time = max(1, BLOCK_SCORES // (key.shape[0] * key.shape[1] * key.shape[2]))
    for chosen in (torch.arange(query.shape[-2]) if rows is None else rows).split(rows_at_a_time):
        scores = query[:, :, chosen] @ key.transpose(-1, -2) * scaling
        visible = columns <= chosen[:, None]
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask[:, :, chosen]
        elif mask is not None:
            bias = mask[:, :, chosen]
            visible = visible & (bias > torch.finfo(mask.dtype).min / 2)
            scores = scores + bias
        yield scores, visible, chosen


def _block_statistics(scores: Tensor, visible: Tensor, is_meta: Tensor) -> RowStatistics:
    batch = scores.shape[0]
    seen = (visible if visible.ndim == 4 else visible[None, None]).expand(batch, -1, -1, -1)
    meta = seen & is_meta.expand(batch, -1)[:, None, None, :]
    of_all, of_meta, of_text = (_softmax_over(scores, keys) for keys in (seen, meta, seen & ~meta))
    first = seen.int().argmax(-1, keepdim=True).expand(-1, scores.shape[1], -1, -1)
    return RowStatistics(
        entropy=of_all.entropy,
        log_sum_exp=of_all.log_sum_exp,
        mean_score=of_all.mean,
        meta_mass=(of_meta.log_sum_exp - of_all.log_sum_exp).exp(),
        meta_log_odds=of_meta.log_sum_exp - of_text.log_sum_exp,
        meta_entropy=of_meta.entropy,
        text_entropy=of_text.entropy,
        sink_mass=(scores.gather(-1, first)[..., 0] - of_all.log_sum_exp).exp(),
        num_keys=seen.sum(-1),
        num_meta_keys=meta.sum(-1),
        max_score=of_all.largest,
    )


@dataclass(frozen=True)
class _Softmax:
    log_sum_exp: Tensor
    entropy: Tensor
    mean: Tensor
    largest: Tensor


def _softmax_over(scores: Tensor, keys: Tensor) -> _Softmax:
    """Return ln Z, H = ln Z' - U / Z' with both terms at least 0, E[s] and max s, over the given keys of each row."""
    kept = torch.where(keys, scores, -torch.inf)
    largest = kept.amax(-1)
    shifted = kept - torch.where(largest.isfinite(), largest, 0)[..., None]
    weights = shifted.exp()
    norm = weights.sum(-1)
    mean = (weights * torch.where(keys, shifted, 0)).sum(-1) / norm  # NaN for a row without keys
    return _Softmax(largest + norm.log(), norm.log() - mean, largest + mean, largest)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return causal attention's output (B, H, T, D) and LSE (B, H, T)."""
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scaling
        )[:2]
    else:
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scaling
        )[:2]
        lse = lse[..., : query.shape[-2]]  # padded to a multiple of 32
    return output, lse


def _count_causal(is_meta: Tensor) -> tuple[Tensor, Tensor]:
    num_keys = torch.arange(1, is_meta.shape[1] + 1).expand(is_meta.shape)[:, None]
    return num_keys, is_meta.long().cumsum(-1)[:, None]


def _redo_rows(
    statistics: RowStatistics, rows: Tensor, query: Tensor, key: Tensor, *, scaling: float, is_meta: Tensor
) -> RowStatistics:
    if not len(rows):
        return statistics
    again = row_statistics(query, key, scaling=scaling, is_meta=is_meta, rows=rows)
    values: dict[str, Any] = {}
    for field in fields(RowStatistics):
        whole, part = getattr(statistics, field.name), getattr(again, field.name)
        values[field.name] = None if whole is None else whole.clone().index_copy_(-1, rows, part)
    return RowStatistics(**values)
