"""Eviction from the key-value cache: what a continuation costs when most of its past is gone.

After a prefix of n positions the cache keeps a budget of columns and loses the rest: keys and values are gathered, so
the memory is free, and every kept key stays rotated by its own position. The continuation is placed behind the prefix
as if nothing had happened. A policy chooses the columns that stay (`policies.py`); all policies keep the same number.

Every policy keeps the meta part of a two-part cache whole, so policies differ in the text part alone; the budget does
not count the M keys of the meta part. Where meta-attention is over all tokens, that part is a second cache of all
tokens and loses the same columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

from metatokens.analysis.causal.policies import ALWAYS_KEPT, POLICIES, AlwaysKept, Policy, Prefix, choose_columns
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.data.injection import IntArray
from metatokens.data.keyed_random import Purpose, hash_key
from metatokens.errors import UsageError
from metatokens.model.cache import MetaDynamicLayer
from metatokens.model.compatibility import CACHE_NAME
from metatokens.model.configuration import BIASES
from metatokens.model.loss import IGNORE_INDEX, targets_of_labels

if TYPE_CHECKING:
    from metatokens.lens.lens import AttentionCall, Lens

FloatArray = npt.NDArray[np.float64]


class Condition(NamedTuple):
    """One way to evict."""

    policy: Policy
    budget: float
    """Share of the prefix's columns that stays."""


def evict(cache: Cache, columns: Tensor, *, with_meta_part: bool = False) -> Cache:
    """Return a cache that holds some columns of another, which stays as it is.

    Tokens that follow must be given their `position_ids`: the cache no longer tells how many came before.

    Args:
        cache: Growing, of one of this package's models or a plain one.
        columns: (B or 1, K) int64, rising; or (B or 1, layers or 1, heads or 1, K) where they differ.
            With more rows than the cache's one, each gets a copy of it.
        with_meta_part: The meta part holds all tokens (`meta_attention_over` "all") and loses the same columns;
            otherwise it is kept whole.

    Raises:
        ValueError: A cache of another kind, or an empty one.
    """
    if columns.ndim == 2:
        columns = columns[:, None, None]
    kept = copy.copy(cache)
    kept.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(kept.layers):
        is_plain = type(layer) is DynamicLayer
        if not (is_plain or _is_growing_meta_layer(layer)) or layer.keys is None:
            raise ValueError(f"an eviction needs a cache that grows and has been filled, not {type(layer).__name__}")
        if len(layer.keys) == 1 < len(columns):
            layer.batch_repeat_interleave(len(columns))
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
    documents: Sequence[Tensor],
    prefix_length: int,
    *,
    budgets: Sequence[float],
    policies: Sequence[Policy] = POLICIES,
    seed: int = 0,
    always_kept: AlwaysKept = ALWAYS_KEPT,
) -> dict[Condition | None, FloatArray]:
    """Return the loss of each document's continuation under each policy and budget, and with the whole cache.

    Args:
        lens: On the model.
        documents: (1, T) int64 each, text and meta-tokens, no padding.
        prefix_length: n, columns before the eviction; what follows is the continuation.
        budgets: Shares of n, in (0, 1]; a budget of 1 costs exactly nothing.
        policies: Which to compare.
        seed: Of the policy "random".
        always_kept: First and newest columns that stay under every policy.

    Returns:
        (documents,) nats per target; None stands for the whole cache.

    Raises:
        UsageError: See `check_evictable`; or a continuation without a target.
        ValueError: A budget outside (0, 1].
    """
    check_evictable(lens.model)
    kept = {budget: count_kept(budget, prefix_length) for budget in budgets}
    losses: dict[Condition | None, list[float]] = {}
    for number, document in enumerate(documents):
        ids = document.to(lens.model.device)
        targets = _continuation_targets(lens, ids, prefix_length)
        prefix, cache = read_prefix(lens, ids[:, :prefix_length], key=int(hash_key(seed, number, Purpose.EVICTION)[0]))
        rest = ids[:, prefix_length:]
        whole = _mean_losses(continue_sequence(lens, cache, rest, prefix_length), targets)[0]
        losses.setdefault(None, []).append(whole)
        for budget, num_kept in kept.items():
            found = [whole] * len(policies)  # of all columns
            if num_kept < prefix_length:
                columns = [choose_columns(policy, prefix, num_kept, always_kept) for policy in policies]
                found = _mean_losses(continue_in_ways(lens, cache, rest, prefix_length, columns), targets)
            for policy, loss in zip(policies, found, strict=True):
                losses.setdefault(Condition(policy, budget), []).append(loss)
    return {condition: np.array(values) for condition, values in losses.items()}


def read_prefix(lens: Lens, input_ids: Tensor, *, key: int = 0) -> tuple[Prefix, Cache]:
    """Run a prefix (1, n) and return what the policies may know of it, and its cache."""
    received: list[FloatArray] = []

    def look(call: AttentionCall) -> None:
        if call.branch == "attn":
            received.append(received_attention(call)[0].double().numpy(force=True))

    with lens.observe(look):
        cache = lens.run(input_ids, use_cache=True)[CACHE_NAME]
    return Prefix(lens.is_meta(input_ids)[0].numpy(force=True), np.stack(received), key), cache


def continue_sequence(
    lens: Lens, cache: Cache, input_ids: Tensor, prefix_length: int, *, columns: IntArray | None = None
) -> Tensor:
    """Return the logits (1, m, V) of a continuation (1, m) behind a prefix; these of its columns stay, None: all.

    The given cache stays unchanged.
    """
    return continue_in_ways(
        lens, cache, input_ids, prefix_length, [np.arange(prefix_length) if columns is None else columns]
    )


def continue_in_ways(
    lens: Lens, cache: Cache, input_ids: Tensor, prefix_length: int, columns: Sequence[IntArray]
) -> Tensor:
    """Do as `continue_sequence` for several choices of equally many columns at once; returns (choices, m, V)."""
    together = np.broadcast_arrays(*columns)
    index = torch.from_numpy(np.stack(together)).to(input_ids.device)
    kept = evict(cache, index, with_meta_part=getattr(lens.model.config, "meta_attention_over", "meta") == "all")
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) + prefix_length
    rows = (len(columns), -1)
    inputs = {"position_ids": positions.expand(rows), "use_cache": True, CACHE_NAME: kept}
    logits: Tensor = lens(input_ids.expand(rows), **inputs).logits
    return logits


def count_kept(budget: float, prefix_length: int) -> int:
    """Return the number of columns of a budget, at least 1.

    Raises:
        ValueError: A budget outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"a budget is a share of the prefix in (0, 1], not {budget}")
    return max(1, round(budget * prefix_length))


def check_evictable(model: Any) -> None:
    """Raise UsageError where attention depends on the number of a column, which an eviction changes."""
    config = model.config
    found = None
    if config.model_type not in ("metatokens", "gpt2", "gpt_neo"):
        found = f"model_type {config.model_type}"
    elif (encoding := getattr(config, "position_encoding", None)) in BIASES:
        found = f"position_encoding {encoding}, whose distances are counted in columns"
    elif "local" in getattr(config, "attention_layers", ()):
        found = "local layers, whose windows are counted in columns"
    if found is not None:
        raise UsageError(
            "model to evict from",
            expected="attention that is causal alone, with positions in the keys or the embeddings",
            found=found,
            remedy="analyse a model with RoPE or learned positions and without local attention",
        )


# tensors -------------------------------------------------------------------------------------------------------


def received_attention(call: AttentionCall) -> Tensor:
    """Return the attention that each key receives from all queries, (B, H, T) float32."""
    total = torch.zeros(call.key_BHTD.shape[:3], device=call.key_BHTD.device)
    for scores, visible, _ in call.score_blocks():
        total[..., : scores.shape[-1]] += scores.masked_fill(~visible, -torch.inf).softmax(-1).sum(-2)
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

    The model needs only their order, and which of them are padding.
    """
    kept = kept.expand(len(meta_columns), -1).contiguous()
    renumbered = torch.searchsorted(kept, meta_columns.contiguous()).clamp(max=kept.shape[-1] - 1)
    return torch.where(meta_columns >= 0, renumbered, -1)


def _continuation_targets(lens: Lens, ids: Tensor, prefix_length: int) -> Tensor:
    targets = targets_of_labels(ids, lens.is_meta(ids), lens.loss_policy)[:, prefix_length:]
    if not (targets != IGNORE_INDEX).any():
        raise UsageError(
            "continuation",
            expected="at least two text tokens behind the prefix",
            found=f"{targets.shape[1]} positions",
            remedy="lower subject.prefix_share",
        )
    return targets


def _mean_losses(logits: Tensor, targets: Tensor) -> list[float]:
    """Return the loss of each row of logits (n, m, V) towards the same targets (1, m)."""
    return [float(nn.functional.cross_entropy(row.double(), targets[0], ignore_index=IGNORE_INDEX)) for row in logits]


@shared
def losses_of(inputs: Inputs) -> dict[Condition | None, FloatArray]:
    """Return the losses of the documents' continuations.

    By default this takes more than ten forward passes: there are 24 ways to evict, and each reads a quarter of the
    window and makes logits of it, which a forward pass of the other measures does not.
    """
    return measure_eviction(
        inputs.lens,
        [document.input_ids for document in inputs.subject.documents],
        _prefix_length(inputs),
        budgets=inputs.config.budgets,
        seed=inputs.config.seed,
        always_kept=ALWAYS_KEPT._replace(newest=inputs.config.newest_kept),
    )


@measure(
    "eviction",
    "nats/token",
    axes=("policy", "kept"),
    subject="text",
    plot=Lines("kept", by="policy"),
    positive="what is dropped helps",
)
def eviction_cost(inputs: Inputs) -> Rows:
    """Loss of a continuation with a share of the prefix's cache kept, minus that with all of it."""
    losses = losses_of(inputs)
    for condition, loss in losses.items():
        if condition is not None:
            yield Row({"policy": condition.policy, "kept": float(condition.budget)}, loss - losses[None])


@measure("eviction", "nats/token", test=True, subject="text", positive="meta-tokens are worth more")
def worth_of_meta_columns(inputs: Inputs) -> Rows:
    """Cost of keeping evenly spaced columns minus that of keeping meta-tokens, at the smallest budget."""
    prefix_length, smallest = _prefix_length(inputs), min(inputs.config.budgets)
    always, num_kept = ALWAYS_KEPT.sinks + inputs.config.newest_kept, count_kept(smallest, prefix_length)
    if not always < num_kept < prefix_length:
        inputs.skip(
            f"worth of meta-columns: at budget {smallest} {num_kept} of {prefix_length} columns stay, "
            f"{always} of them under every policy"
        )
        return
    losses = losses_of(inputs)
    full, even, meta = (losses[key] for key in (None, Condition("even", smallest), Condition("meta", smallest)))
    yield Row({}, (even - full) - (meta - full))


def _prefix_length(inputs: Inputs) -> int:
    window = inputs.text.window
    prefix_length = int(inputs.text.prefix_share * window)
    if not 0 < prefix_length < window:
        raise UsageError(
            "subject.prefix_share",
            expected="a share that leaves tokens before and behind the cut",
            found=f"{prefix_length} of {window} positions",
            remedy="take 0.75",
        )
    return prefix_length
