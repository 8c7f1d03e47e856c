"""Eviction from the key-value cache: what a continuation costs when most of its past is gone.

After a prefix of n positions the cache keeps a budget of columns and loses the rest: keys and values are gathered, so
the memory is free, and every kept key stays rotated by its own position. The continuation is placed behind the prefix
as if nothing had happened. Which columns stay is the policy's (`eviction_policies.py`); all policies get as many.

The meta part of a two-part cache is kept whole under every policy, so what policies differ in is the text part alone:
its M keys are memory that the budget does not count. Where meta-attention is over all tokens, that part is a second
cache of all tokens and loses the same columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

from metatokens.analysis.causal.policies import ALWAYS_KEPT, AlwaysKept, Policy, Prefix, choose_columns
from metatokens.analysis.inputs.subject import Inputs, shared, stack
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.data.injection import BoolArray, IntArray
from metatokens.data.keyed_random import Purpose, hash_key
from metatokens.errors import UsageError
from metatokens.model.cache import MetaDynamicLayer
from metatokens.model.compatibility import CACHE_NAME
from metatokens.model.loss import IGNORE_INDEX, targets_of_labels

if TYPE_CHECKING:
    from metatokens.lens.lens import AttentionCall, Lens

FloatArray = npt.NDArray[np.float64]

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
DEFAULT_POLICIES: tuple[Policy, ...] = ("window", "meta", "slots", "even", "random", "heavy_hitters")
_QUERIES_AT_ONCE = 256  # bounds the memory of attention weights


class Condition(NamedTuple):
    """One way to evict."""

    policy: Policy
    budget: float
    """Share of the prefix's columns that stays."""


@dataclass(frozen=True)
class EvictionCosts:
    """Loss of the continuation of each document; arrays of shape (documents,)."""

    full: FloatArray
    """Nats per target with the whole cache."""
    num_targets: IntArray
    """Targets of each document, those that the prefix itself predicts left out."""
    num_kept: dict[float, int]
    """Columns that stay, by budget."""
    costs: dict[Condition, FloatArray]
    """Nats per target more than `full`."""


def evict(cache: Cache, columns: Tensor, *, with_meta_part: bool = False) -> Cache:
    """Return a cache that holds some columns of another, which stays as it is.

    Tokens that follow must be given their `position_ids`: the cache no longer tells how many came before.

    Args:
        cache: growing, of one of this package's models or a plain one.
        columns: (B or 1, K) int64, rising; or (B or 1, layers or 1, heads or 1, K) where they differ.
        with_meta_part: the meta part holds all tokens (`meta_attention_over` "all") and loses the same columns;
            otherwise it is kept whole.

    Raises:
        UsageError: a cache of another kind.
    """
    if columns.ndim == 2:
        columns = columns[:, None, None]
    kept = copy.copy(cache)
    kept.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(kept.layers):
        is_plain = type(layer) is DynamicLayer
        if not (is_plain or _is_growing_meta_layer(layer)) or layer.keys is None:
            raise UsageError(
                "cache to evict from",
                expected="one that grows and has been filled",
                found=type(layer).__name__,
                remedy="fill a DynamicCache(config=model.config)",
            )
        of_layer = columns[:, min(number, columns.shape[1] - 1)]
        layer.keys, layer.values = _gather(layer.keys, of_layer), _gather(layer.values, of_layer)
        if not is_plain and layer.meta_columns is not None:
            if with_meta_part:
                layer.meta_keys = _gather(layer.meta_keys, of_layer)
                layer.meta_values = _gather(layer.meta_values, of_layer)
                new_columns = torch.arange(of_layer.shape[-1], device=of_layer.device)
                layer.meta_columns = new_columns.expand(len(layer.meta_columns), -1)
            else:
                layer.meta_columns = _renumber(layer.meta_columns, of_layer[:, 0])
    return kept


def measure_eviction(
    lens: Lens,
    input_ids: IntArray,
    prefix_length: int,
    *,
    meta_token_id: int,
    policies: Sequence[Policy] = DEFAULT_POLICIES,
    budgets: Sequence[float] = BUDGETS,
    slots: BoolArray | None = None,
    seed: int = 0,
    always_kept: AlwaysKept = ALWAYS_KEPT,
) -> EvictionCosts:
    """Return what the continuation of each document costs under each policy and budget.

    Args:
        lens: around the model.
        input_ids: (documents, T), text and meta-tokens, no padding.
        prefix_length: n, columns before the eviction; what follows is the continuation.
        meta_token_id: of the meta-tokens in `input_ids`.
        policies: which to compare.
        budgets: shares of n, in (0, 1]; at 1 the cost is exactly 0.
        slots: (documents, n) bool, columns for the policy "slots"; by default those before each meta-token.
        seed: of the policy "random".
        always_kept: first and newest columns that stay under every policy.

    Raises:
        UsageError: see `check_model`; a budget outside (0, 1]; or a continuation without a target.
    """
    check_model(lens.model)
    kept = {budget: count_kept(budget, prefix_length) for budget in budgets}
    documents = np.asarray(input_ids)
    losses: dict[Condition | None, list[float]] = {}
    num_targets = []
    for number, row in enumerate(documents):
        ids = torch.from_numpy(row[None]).to(lens.model.device)
        targets = _continuation_targets(lens.model, ids, prefix_length, meta_token_id)
        num_targets.append(int((targets != IGNORE_INDEX).sum()))
        prefix, cache = read_prefix(
            lens,
            ids[:, :prefix_length],
            meta_token_id=meta_token_id,
            with_attention="heavy_hitters" in policies,
            slots=None if slots is None else slots[number],
            key=int(hash_key(seed, number, Purpose.EVICTION)[0]),
        )
        for condition, columns in _all_columns(prefix, policies, kept, always_kept):
            logits = continue_sequence(lens, cache, ids[:, prefix_length:], prefix_length, columns=columns)
            losses.setdefault(condition, []).append(_mean_loss(logits, targets))
    full = np.array(losses.pop(None))
    costs = {key: np.array(values) - full for key, values in losses.items() if key is not None}
    return EvictionCosts(full, np.array(num_targets), kept, costs)


def read_prefix(
    lens: Lens,
    input_ids: Tensor,
    *,
    meta_token_id: int,
    with_attention: bool = False,
    slots: BoolArray | None = None,
    key: int = 0,
) -> tuple[Prefix, Cache]:
    """Run a prefix (1, n) and return what the policies may know of it, and its cache."""
    received = _ReceivedAttention()
    if with_attention:
        with lens.observe(received):
            cache = lens(input_ids, use_cache=True)[CACHE_NAME]
    else:
        cache = lens(input_ids, use_cache=True)[CACHE_NAME]
    ids = input_ids[0].cpu().numpy()
    is_meta = ids == meta_token_id
    if slots is None:
        slots = np.append(is_meta[1:], False) & ~is_meta
    attention = np.stack(received.layers) if with_attention else None
    return Prefix(is_meta, slots, attention, key), cache


def continue_sequence(
    lens: Lens, cache: Cache, input_ids: Tensor, prefix_length: int, *, columns: IntArray | None = None
) -> Tensor:
    """Return the logits (1, m, V) of a continuation (1, m) behind a prefix of which these columns stay; None: all.

    The cache given is left as it is.
    """
    model = lens.model
    everything = np.arange(prefix_length)
    index = torch.from_numpy(everything if columns is None else columns)[None].to(input_ids.device)
    kept = evict(cache, index, with_meta_part=getattr(model.config, "meta_attention_over", "meta") == "all")
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + prefix_length
    logits: Tensor = lens(input_ids, position_ids=positions, use_cache=True, **{CACHE_NAME: kept}).logits
    return logits


def count_kept(budget: float, prefix_length: int) -> int:
    """Return the number of columns of a budget, at least 1.

    Raises:
        UsageError: A budget outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise UsageError(
            "budget of an eviction", expected="a share in (0, 1]", found=str(budget), remedy="give 0.1 for a tenth"
        )
    return max(1, round(budget * prefix_length))


def check_model(model: Any) -> None:
    """Raise UsageError where attention depends on the number of a column, which an eviction changes."""
    config = model.config
    found = None
    if config.model_type not in ("metatokens", "gpt2", "gpt_neo"):
        found = f"model_type {config.model_type}"
    elif getattr(config, "position_encoding", None) == "alibi":
        found = "position_encoding alibi, whose distances are counted in columns"
    elif "local" in getattr(config, "attention_layers", ()):
        found = "local layers, whose windows are counted in columns"
    if found is not None:
        raise UsageError(
            "model to evict from",
            expected="attention that is causal alone, with positions in the keys or the embeddings",
            found=found,
            remedy="compare models of another kind",
        )


def _all_columns(
    prefix: Prefix, policies: Sequence[Policy], kept: dict[float, int], always_kept: AlwaysKept
) -> Iterator[tuple[Condition | None, IntArray | None]]:
    """Yield every condition with its columns; the whole cache is (None, None)."""
    yield None, None
    for policy in policies:
        for budget, num_kept in kept.items():
            yield Condition(policy, budget), choose_columns(policy, prefix, num_kept, always_kept)


# tensors -------------------------------------------------------------------------------------------------------


@dataclass
class _ReceivedAttention:
    """Sums, layer by layer, the attention that each column of one row receives from all queries of all heads."""

    layers: list[FloatArray] = field(default_factory=list)
    """(heads, n) each."""

    def __call__(self, call: AttentionCall) -> None:
        if call.branch == "attn":
            self.layers.append(received_attention(call)[0].double().cpu().numpy())


def received_attention(call: AttentionCall) -> Tensor:
    """Return the attention that each key receives from all queries, (B, H, T) float32."""
    num_tokens = call.key_BHTD.shape[2]
    columns = torch.arange(num_tokens, device=call.key_BHTD.device)
    keys_BHDT = call.key_BHTD.float().transpose(-1, -2)
    total = torch.zeros(call.key_BHTD.shape[:3], device=columns.device)
    for start in range(0, num_tokens, _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        scores = call.query_BHTD[:, :, rows].float() @ keys_BHDT * call.scaling
        if call.mask is not None and call.mask.dtype != torch.bool:
            scores = scores + call.mask[:, :, rows]
        seen = columns <= columns[rows, None]
        if call.mask is not None and call.mask.dtype == torch.bool:
            seen = seen & call.mask[:, :, rows]
        total += scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(-2)
    return total


def _is_growing_meta_layer(layer: Any) -> bool:
    # its attributes and not its class: it may be that of a checkpoint's own copy of the model's code
    return layer._layer_type == MetaDynamicLayer._layer_type and not layer.is_compileable


def _gather(tensor_BHTD: Tensor | None, columns: Tensor) -> Tensor:
    """Return columns (B or 1, H or 1, K) of keys or values, (B, H, K, D)."""
    assert tensor_BHTD is not None
    shape = (*tensor_BHTD.shape[:2], columns.shape[-1])
    return tensor_BHTD.gather(2, columns.expand(shape)[..., None].expand(*shape, tensor_BHTD.shape[-1]))


def _renumber(meta_columns: Tensor, kept: Tensor) -> Tensor:
    """Return the new column of each meta-token: its own where it stays, else that of the next one that does.

    What is asked of them is whether they are real, and the order.
    """
    kept = kept.expand(len(meta_columns), -1).contiguous()
    renumbered = torch.searchsorted(kept, meta_columns.contiguous()).clamp(max=kept.shape[-1] - 1)
    return torch.where(meta_columns >= 0, renumbered, -1)


def _continuation_targets(model: Any, ids: Tensor, prefix_length: int, meta_token_id: int) -> Tensor:
    policy = getattr(model.config, "loss_policy", "skip")
    targets = targets_of_labels(ids, ids == meta_token_id, policy)[:, prefix_length:]
    if not (targets != IGNORE_INDEX).any():
        raise UsageError(
            "continuation",
            expected="at least two text tokens behind the prefix",
            found=f"{targets.shape[1]} positions",
            remedy="shorten the prefix",
        )
    return targets


def _mean_loss(logits: Tensor, targets: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[0].double(), targets[0], ignore_index=IGNORE_INDEX))


@shared
def costs_of(inputs: Inputs) -> EvictionCosts:
    """Return what evictions cost the documents."""
    window = inputs.text.window
    prefix_length = int(inputs.text.prefix_share * window)
    if not 0 < prefix_length < window:
        raise UsageError(
            "subject.prefix_share",
            expected="a share that leaves tokens before and behind the cut",
            found=f"{prefix_length} of {window} positions",
            remedy="take 0.75",
        )
    return measure_eviction(
        inputs.lens,
        stack(inputs.subject.documents).numpy(),
        prefix_length,
        meta_token_id=inputs.meta_token_id,
        budgets=inputs.config.budgets,
        seed=inputs.config.seed,
        always_kept=ALWAYS_KEPT._replace(newest=inputs.config.newest_kept),
    )


@measure("eviction", "nats/token", axes=("policy", "kept"), subject="text", plot=Lines("kept", by="policy"))
def eviction_cost(inputs: Inputs) -> Rows:
    """Loss of a continuation with a share of the prefix's cache kept, minus with all of it, by what is kept."""
    for condition, cost in costs_of(inputs).costs.items():
        yield Row({"policy": condition.policy, "kept": float(condition.budget)}, cost)


@measure("eviction", "nats/token", test=True, subject="text")
def worth_of_meta_columns(inputs: Inputs) -> Rows:
    """Cost of keeping evenly spaced columns minus that of keeping meta-tokens, at the smallest budget."""
    costs, smallest = costs_of(inputs), min(inputs.config.budgets)
    prefix_length = int(inputs.text.prefix_share * inputs.text.window)
    always = ALWAYS_KEPT.sinks + inputs.config.newest_kept
    if not always < costs.num_kept[smallest] < prefix_length:
        inputs.skip(
            f"worth of meta-columns: at budget {smallest} {costs.num_kept[smallest]} of {prefix_length} columns stay, "
            f"{always} of them under every policy"
        )
        return
    by_policy = {key.policy: cost for key, cost in costs.costs.items() if key.budget == smallest}
    yield Row({}, by_policy["even"] - by_policy["meta"])
