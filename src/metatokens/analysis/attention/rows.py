"""What attention rows look like, exactly, without ever storing one: entropy, mass on meta-tokens, log-odds.

All logarithms are natural, so entropies are in nats. With scores s of a row over its visible keys, S the meta keys
among them and C the others,

    entropy            H = LSE - E[s]             LSE = ln sum e^s, E under the softmax
    meta mass          P = sum over S of the weights
    meta log-odds      ln P / (1 - P) = LSE_S - LSE_C
    chain rule         H = h(P) + P H_S + (1 - P) H_C

Two paths give the same numbers, and a test says so. `row_statistics` takes blocks of queries with all their keys:
obvious, any mask, any sample of rows. `fused_statistics` asks the fused causal kernel for each of S and C, with the
keys in place of the values; on one CPU core it takes 1 / 1.8 of the time at 1,024 tokens, 1 / 1.2 at 8,192. Both know
the row from its two sets by the chain rule, a sum of terms that are none of them negative, so that a set of next to no
weight has its entropy and its odds as exactly as the other. Queries and keys are taken as the model used them, after
rotation, in float32: in bfloat16 the second path would be wrong by up to 0.15 nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from metatokens.baselines.landmark import LandmarkConfig
from metatokens.errors import UsageError
from metatokens.lens.layout import Branch
from metatokens.lens.lens import AttentionCall, Lens

BLOCK_SCORES = 2**22
"""Scores at a time, at most, but for a single row: 16 MB."""
SINK_LEAVES = 1e-2
"""With less than this beside the sink, the entropy of the rest is lost to rounding."""
HIDDEN = -1e10
"""Added to the scores of keys outside a set: beyond any score, and far from float32's end."""
LANES = 8
"""Fused kernels want heads of a multiple of these."""
SELF_CHECK_TOKENS = 64
SELF_CHECK_TOLERANCE = 1e-4


@dataclass(frozen=True)
class RowStatistics:
    """Of each attention row, float32, (B, H, Q) each; NaN where a row has no key of the set, as padding may."""

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
    max_score: Tensor
    """Largest score of the row; a common shift of all scores moves it and no weight."""

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
        return torch.where(rest > SINK_LEAVES, (self.entropy - binary_entropy(self.sink_mass)) / rest, torch.nan)

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
    is_meta = is_meta.expand(key_BHKD.shape[0], -1)
    start = 0
    for scores, visible, chosen in score_blocks(query_BHQD, key_BHKD, scaling=scaling, mask=mask, rows=rows):
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

    The kernel gives LSE and, with the keys as values, E[k] and so E[s] = scaling q . E[k]. It is asked once for each
    set; one more lane, 1 in the queries, hides the other set's keys. Keys are centred on their mean first, which shifts
    a row's scores alike, changes no weight and costs the smaller numbers less.
    """
    query, key = query_BHTD.float(), key_BHTD.float()
    is_meta = is_meta.expand(key.shape[0], -1)
    mean_key = key.mean(-2, keepdim=True)
    shift = (query @ mean_key.transpose(-1, -2))[..., 0] * scaling
    lane = query.shape[-1]
    wide_query, value = (torch.nn.functional.pad(x, (0, LANES - lane % LANES)) for x in (query, key - mean_key))
    wide_query[..., lane] = 1
    num_keys, num_meta = _count_causal(is_meta)
    of_sets = []
    for members, count in ((is_meta, num_meta), (~is_meta, num_keys - num_meta)):
        wide_key = value.clone()
        wide_key[..., lane] = torch.where(members, 0.0, HIDDEN / scaling)[:, None]
        expected_key, lse = _fused(wide_query, wide_key, value, scaling)
        mean = (query * expected_key[..., :lane]).sum(-1) * scaling
        has_keys = count > 0
        of_sets.append(
            _Softmax(
                log_sum_exp=torch.where(has_keys, lse, -torch.inf),
                entropy=torch.where(has_keys, (lse - mean).clamp(min=0), torch.nan),
                mean=torch.where(has_keys, mean, torch.nan),
            )
        )
    centred = _join(
        *of_sets,
        first_score=(wide_query * value[..., :1, :]).sum(-1) * scaling,
        max_score=_largest_scores(query, key, scaling),
        num_keys=num_keys,
        num_meta_keys=num_meta,
    )
    return replace(centred, log_sum_exp=centred.log_sum_exp + shift, mean_score=centred.mean_score + shift)


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

    def standard_error(self, values: Tensor, num_tokens: int) -> Tensor:
        """Return the sampling error of the mean over the queries drawn, as an estimate of the mean over all.

        From the differences of neighbours, so that a trend along the sequence does not count as noise; a steep one
        makes it too large rather than too small. It says nothing of other documents.

        Args:
            values: (..., queries) a statistic at the queries that `draw` gave, in their order; NaN is left out.
            num_tokens: of the sequence.

        Returns:
            (...); 0 where every query was drawn, NaN with fewer than two values.
        """
        drawn = values.shape[-1]
        squares = values.diff(dim=-1) ** 2 / 2
        num_values = values.isfinite().sum(-1)
        left_out = 1 - drawn / num_tokens
        return (torch.nanmean(squares, dim=-1) / num_values * left_out).sqrt()


def attention_statistics(
    lens: Lens,
    input_ids: Tensor,
    *,
    is_meta: Tensor,
    branches: Sequence[Branch] = ("attn", "meta_attn"),
    queries: StratifiedQueries | None = None,
    **inputs: Any,
) -> dict[tuple[int, Branch], RowStatistics]:
    """Return the row statistics of every attention of a model, each computed as it runs, so that none is stored.

    Rows of padding tokens are returned like all others: they mean nothing, and are NaN where they see no key.

    Args:
        lens: of the model.
        input_ids: (B, T).
        is_meta: (B, T) bool, True at meta-tokens.
        branches: which attentions. Rows of "meta_attn" are its packed meta-tokens, all of whose keys are meta; rows of
            the batch with fewer of them end in padding.
        queries: a sample of the queries of "attn"; None takes all, through the fused kernel where attention is plain.
        **inputs: of the model, such as `attention_mask`.

    Raises:
        UsageError: an attention that is no softmax of these scores, or a kernel that fails its check.
    """
    check_plain_softmax(lens)
    check_fused_kernel(input_ids.device)
    found: dict[tuple[int, Branch], RowStatistics] = {}

    def look(call: AttentionCall) -> None:
        rows = rows_of(call, queries)
        shared: dict[str, Any] = {"scaling": call.scaling, "is_meta": members_of(call, is_meta)}
        if call.mask is None and rows is None:
            statistics = fused_statistics(call.query_BHTD, call.key_BHTD, **shared)
        else:
            statistics = row_statistics(call.query_BHTD, call.key_BHTD, mask=mask_of(call), rows=rows, **shared)
        found[call.layer, call.branch] = statistics

    observe_attention(lens, look, branches, input_ids, inputs)
    return found


def observe_attention(
    lens: Lens,
    look: Callable[[AttentionCall], None],
    branches: Sequence[Branch],
    input_ids: Tensor,
    inputs: dict[str, Any],
) -> None:
    """Run a model, and hand each attention of these branches to a function as it runs."""
    with lens.observe(lambda call: look(call) if call.branch in branches else None):
        # neither a cache nor the logits of 8,192 tokens (1.6 GB at GPT-2's vocabulary) are asked for
        lens(input_ids, **{"use_cache": False, "logits_to_keep": 1, **inputs})


def rows_of(call: AttentionCall, queries: StratifiedQueries | None) -> Tensor | None:
    """Return the queries to look at; None means all, as ever in meta-attention, which is small."""
    if queries is None or call.branch == "meta_attn":
        return None
    return queries.draw(call.query_BHTD.shape[-2])


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


def check_fused_kernel(device: torch.device | str = "cpu") -> None:
    """Compare the fused path with a dense float64 softmax on random rows.

    Raises:
        UsageError: They differ by more than 1e-4 nats; the kernel is an internal of torch.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, SELF_CHECK_TOKENS, 16, generator=generator).to(device) * 2 for _ in range(2))
    is_meta = torch.arange(SELF_CHECK_TOKENS, device=device)[None] % 7 == 3
    fused = fused_statistics(query, key, scaling=0.25, is_meta=is_meta)
    dense = row_statistics(query.double(), key.double(), scaling=0.25, is_meta=is_meta)
    # NaN and infinity where there is no key of a set
    error = max(
        float((torch.nan_to_num(getattr(fused, name)) - torch.nan_to_num(getattr(dense, name)).float()).abs().max())
        for name in ("entropy", "meta_mass", "meta_entropy", "text_entropy")
    )
    if not error <= SELF_CHECK_TOLERANCE:
        raise UsageError(
            "fused attention kernel",
            expected=f"statistics within {SELF_CHECK_TOLERANCE} of a dense softmax",
            found=f"{error:.2g}",
            remedy="sample the queries (StratifiedQueries), which does without it",
        )


def score_blocks(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask: Tensor | None,
    rows: Tensor | None,
    block_scores: int = BLOCK_SCORES,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield causal attention's scores, block of queries by block of queries, in float32 or better.

    Args:
        query: (B, H, T, D), as in `row_statistics`, whose arguments the others are.
        key: (B, H, T, D).
        scaling: what products are multiplied by.
        mask: None, bool or additive.
        rows: (Q,) indices of queries.
        block_scores: scores at a time, at most, but for a single row.

    Yields:
        Scores (B, H, r, K) over the keys up to the last query's own, bool (1 or B, 1 or H, r, K), which of them are
        visible, and the indices (r,) of the queries.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(precise), key.to(precise)
    everything = torch.arange(query.shape[-2], device=query.device)
    rows_at_a_time = max(1, block_scores // (key.shape[0] * key.shape[1] * key.shape[2]))
    for chosen in (everything if rows is None else rows.to(query.device)).split(rows_at_a_time):
        num_keys = int(chosen.max()) + 1
        scores = query[:, :, chosen] @ key[:, :, :num_keys].transpose(-1, -2) * scaling
        visible = (everything[:num_keys] <= chosen[:, None])[None, None]
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask[:, :, chosen, :num_keys]
        elif mask is not None:
            bias = mask[:, :, chosen, :num_keys]
            visible = visible & (bias > torch.finfo(mask.dtype).min / 2)
            scores = scores + bias
        yield scores, visible, chosen


def _block_statistics(scores: Tensor, visible: Tensor, is_meta: Tensor) -> RowStatistics:
    meta = visible & is_meta[:, None, None, : scores.shape[-1]]
    seen = visible.expand(meta.shape)
    first = seen.int().argmax(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    return _join(
        _softmax_over(scores, meta),
        _softmax_over(scores, seen & ~meta),
        first_score=scores.gather(-1, first)[..., 0],
        max_score=torch.where(seen, scores, -torch.inf).amax(-1),
        num_keys=seen.sum(-1),
        num_meta_keys=meta.sum(-1),
    )


@dataclass(frozen=True)
class _Softmax:
    """Of each row over one set of its keys."""

    log_sum_exp: Tensor
    """Minus infinity without such a key."""
    entropy: Tensor
    """NaN without such a key, as the mean."""
    mean: Tensor


def _softmax_over(scores: Tensor, keys: Tensor) -> _Softmax:
    """Return ln Z, H = ln Z' - U / Z' with both terms at least 0, and E[s], over the given keys of each row."""
    kept = torch.where(keys, scores, -torch.inf)
    largest = kept.amax(-1)
    shifted = kept - torch.where(largest.isfinite(), largest, 0)[..., None]
    weights = shifted.exp()
    norm = weights.sum(-1)
    mean = (weights * torch.where(keys, shifted, 0)).sum(-1) / norm  # NaN for a row without keys
    return _Softmax(largest + norm.log(), norm.log() - mean, largest + mean)


def _join(
    meta: _Softmax,
    text: _Softmax,
    *,
    first_score: Tensor,
    max_score: Tensor,
    num_keys: Tensor,
    num_meta_keys: Tensor,
) -> RowStatistics:
    """Return the statistics of rows from those of their two sets of keys."""
    has_keys = num_keys > 0
    log_sum_exp = torch.logaddexp(meta.log_sum_exp, text.log_sum_exp)
    log_odds = meta.log_sum_exp - text.log_sum_exp
    mass, rest = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)

    def average(of_meta: Tensor, of_text: Tensor) -> Tensor:
        """Weigh the sets by their masses; a set without keys has none."""
        return torch.where(mass > 0, mass * of_meta, 0) + torch.where(rest > 0, rest * of_text, 0)

    between = torch.special.entr(mass) + torch.special.entr(rest)
    entropy = between + average(meta.entropy, text.entropy)
    return RowStatistics(
        entropy=torch.where(has_keys, entropy, torch.nan),
        log_sum_exp=log_sum_exp,
        mean_score=torch.where(has_keys, average(meta.mean, text.mean), torch.nan),
        meta_mass=mass,
        meta_log_odds=log_odds,
        meta_entropy=meta.entropy,
        text_entropy=text.entropy,
        sink_mass=torch.where(has_keys, (first_score - log_sum_exp).exp(), torch.nan),
        num_keys=num_keys,
        num_meta_keys=num_meta_keys,
        max_score=max_score,
    )


def _largest_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return the largest score of each causal row, (B, H, T)."""
    largest = query.new_empty(query.shape[:-1])
    for scores, visible, chosen in score_blocks(query, key, scaling=scaling, mask=None, rows=None):
        largest[..., chosen] = scores.masked_fill_(~visible, -torch.inf).amax(-1)
    return largest


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
    num_keys = torch.arange(1, is_meta.shape[1] + 1, device=is_meta.device).expand(is_meta.shape)[:, None]
    return num_keys, is_meta.long().cumsum(-1)[:, None]
