"""Reading under a policy: columns are really dropped from the cache after each forward pass.

`Plan` knows the columns, once for all layers; `EvictingLayer` keeps their keys and values. A forward pass attends to
the columns that are left, its own tokens, and the pools that become due; afterwards only what its last query sees
stays. Keys keep the rotation of their positions. The result is that of one pass over the whole text under the policy's
mask, whatever the size of the chunks (a test holds this in float64).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from metatokens.errors import UsageError
from metatokens.evaluation.eviction.policies import Budget, Columns, Policy
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.model.compatibility import CACHE_NAME
from metatokens.model.configuration import BIASES
from metatokens.model.generation import MetaTokenGenerationMixin

NOTHING = -1  # the position of a column that a row lacks


@dataclass
class Step:
    """What one forward pass does to the columns of every layer."""

    pools: Tensor | None
    """(B, P, n) columns whose mean each new pool is; None if none is due."""
    stay: Tensor
    """(B, K) columns that are left afterwards, among old ones, new tokens and new pools, in this order."""

    def with_pools(self, states: Tensor) -> Tensor:
        """Return keys or values (B, H, C, D) with the new pools behind them."""
        if self.pools is None:
            return states
        batch, num_pools, span = self.pools.shape
        index = self.pools.reshape(batch, 1, num_pools * span, 1)
        members = torch.take_along_dim(states, index, dim=2)
        return torch.cat([states, members.unflatten(2, (num_pools, span)).mean(3)], dim=2)

    def left_of(self, states: Tensor) -> Tensor:
        """Return the keys or values that stay, (B, H, K, D)."""
        return torch.take_along_dim(states, self.stay[:, None, :, None], dim=2)


class EvictingLayer(DynamicLayer):
    """A layer's keys and values, some of which a step drops."""

    def __init__(self, plan: Plan) -> None:
        """Follow a plan, which all layers share."""
        super().__init__()
        self.plan = plan

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what this forward pass attends to, and keep what the step leaves."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        step = self.plan.step
        keys, values = step.with_pools(keys), step.with_pools(values)
        self.keys, self.values = step.left_of(keys), step.left_of(values)
        return keys, values


class Plan:
    """The columns of the cache, and the step that is under way."""

    step: Step

    def __init__(self, policy: Policy, budget: Budget) -> None:
        """Begin with an empty cache."""
        self._policy = policy
        self._budget = budget
        self._span = 0 if policy.tokens_in_pool is None else policy.tokens_in_pool(budget)
        self.columns: Columns | None = None

    def begin(self, positions: Tensor, is_separator: Tensor) -> Tensor:
        """Plan the forward pass of new tokens.

        Args:
            positions: (B, Q) int64, `NOTHING` at padding, which stands at the left.
            is_separator: (B, Q) bool.

        Returns:
            (B, Q, C) bool, True where a query sees a column.
        """
        new = Columns(positions, is_separator, torch.zeros_like(is_separator))
        columns = new if self.columns is None else self.columns.joined(new)
        num_old = columns.positions.shape[1] - positions.shape[1]
        pools = self._due_pools(columns) if self._span else None
        if pools is not None:
            columns = columns.joined(pools[1])
        visible = self._policy.sees(columns, positions, self._budget)
        visible &= (columns.positions != NOTHING)[:, None] & (columns.positions[:, None] <= positions[..., None])
        # a row of a mask without any True has no softmax, so padding sees itself
        own = torch.arange(positions.shape[1], device=positions.device)
        visible[:, own, num_old + own] = True
        self._leave(columns, visible[:, -1], None if pools is None else pools[0])
        return visible

    def _leave(self, columns: Columns, seen: Tensor, pools: Tensor | None) -> None:
        """Keep the columns that the last query sees; rows with fewer of them get `NOTHING` at the left."""
        num_kept = int(seen.sum(-1).max())
        # False sorts before True, and equal ones keep their order
        stay = seen.to(torch.int8).argsort(dim=-1, stable=True)[:, seen.shape[1] - num_kept :]
        self.step = Step(pools, stay)
        self.columns = Columns(
            columns.positions.masked_fill(~seen, NOTHING).gather(1, stay),
            columns.is_separator.gather(1, stay),
            columns.is_pool.gather(1, stay),
        )

    def _due_pools(self, columns: Columns) -> tuple[Tensor, Columns] | None:
        """Return the pools that some query of this pass may see first: their members (B, P, n), and their columns."""
        span, sinks = self._span, self._budget.sinks
        is_token = (columns.positions != NOTHING) & ~columns.is_pool
        tokens = columns.positions.masked_fill(~is_token, NOTHING)
        place = tokens - sinks
        # a span that is complete ends in this column, and all of it is still here
        ends = (place >= 0) & (place % span == span - 1)
        count = int(ends.sum(-1).max())
        if count == 0:
            return None
        order = ends.to(torch.int8).argsort(dim=-1, stable=True)[:, ends.shape[1] - count :]
        last = tokens.masked_fill(~ends, NOTHING).gather(1, order)
        wanted = last[..., None] - torch.arange(span - 1, -1, -1, device=last.device)
        members = (tokens[:, None, None] == wanted[..., None]).to(torch.int8).argmax(-1)
        nothing = torch.zeros_like(last, dtype=torch.bool)
        return members, Columns(last, nothing, ~nothing)


class Reader:
    """Reads texts with a model under a policy, in chunks of any size; one reader for one batch of texts."""

    def __init__(self, model: Any, policy: Policy, budget: Budget, *, separators: Tensor | None = None) -> None:
        """Begin with an empty cache.

        Args:
            model: a causal language model of transformers, in evaluation mode.
            policy: what stays.
            budget: how much.
            separators: (V,) bool, which ids end a clause; the policy `separators` needs it.

        Raises:
            UsageError: the policy drops columns, and the model cannot do without them.
        """
        self.model = model
        # a model of this package counts a padded row from its first token by itself, and memory mode in its own way
        counts_itself = policy.name == "full" and isinstance(model, MetaTokenGenerationMixin)
        self._needs_positions = "position_ids" in inspect.signature(model.forward).parameters and not counts_itself
        policy.check(budget)
        self._separators = separators
        self._read = 0
        self._mask: Tensor | None = None
        self._counts: Tensor | None = None
        self.plan = Plan(policy, budget) if policy.evicts else None
        if self.plan is None:
            self.cache = DynamicCache(config=model.config)
            return
        check_evictable(model)
        self.cache = DynamicCache()
        self.cache.layers = [EvictingLayer(self.plan) for _ in range(_text_config(model).num_hidden_layers)]
        self.cache.layer_class_to_replicate = None

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, logits_to_keep: int = 0) -> Tensor:
        """Read the next tokens of each row and return their logits.

        Args:
            input_ids: (B, Q) int64.
            attention_mask: (B, Q), 0 at padding, which is allowed at the left of a row alone; None means none.
            logits_to_keep: how many logits to compute, counted from the end; 0 means all.

        Returns:
            (B, Q or logits_to_keep, V).
        """
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        read_before = torch.zeros_like(is_token[:, :1]) if self._counts is None else self._counts
        positions = read_before + is_token.cumsum(-1) - 1
        self._counts = positions[:, -1:] + 1
        self._mask = is_token if self._mask is None else torch.cat([self._mask, is_token], 1)
        inputs: dict[str, Any] = {}
        if self.plan is not None:
            inputs["attention_mask"] = self._four_dimensional(positions.masked_fill(is_token == 0, NOTHING), input_ids)
        elif not bool(self._mask.all()):
            inputs["attention_mask"] = self._mask
        if self._needs_positions and "attention_mask" in inputs:
            inputs["position_ids"] = positions.clamp(min=0)
        logits: Tensor = self.model(
            input_ids=input_ids, use_cache=True, logits_to_keep=logits_to_keep, **{CACHE_NAME: self.cache}, **inputs
        ).logits
        return logits

    def _four_dimensional(self, positions: Tensor, input_ids: Tensor) -> Tensor:
        """Return the additive mask (B, 1, Q, C) of a pass, which every attention of transformers but flash takes."""
        assert self.plan is not None
        table = self._separators
        is_separator = torch.zeros_like(input_ids, dtype=torch.bool) if table is None else table[input_ids]
        visible = self.plan.begin(positions, is_separator)
        dtype = self.model.dtype
        hidden = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=visible.device)
        return hidden.masked_fill(visible, 0)[:, None]

    def count_columns(self) -> list[int]:
        """Return how many columns the fullest layer holds for each row: a second cache counts, padding does not."""
        assert self._mask is not None
        if self.plan is not None and self.plan.columns is not None:
            return [int(count) for count in (self.plan.columns.positions != NOTHING).sum(-1)]
        padding = (self._mask == 0).sum(-1)
        # a layer without keys of its own, such as one of linear attention, has no columns
        held = [_held(layer, padding) for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        return [int(count) for count in torch.stack([torch.zeros_like(padding), *held]).amax(0)]

    def count_bytes(self) -> int:
        """Return the bytes of all keys, values and other states in the cache, for all rows together."""
        # once each: a layer of memory mode has its keys under two names
        tensors = {id(value): value for layer in self.cache.layers for value in vars(layer).values()}.values()
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.is_floating_point())


def _held(layer: Any, padding: Tensor) -> Tensor:
    """Return (B,) how many columns a layer of the model's own cache holds for each row."""
    state = getattr(layer, "state", None)  # of memory mode, whose rows are ragged
    if state is not None and state.columns is not None:
        held: Tensor = state.columns.is_real.sum(-1)
    else:
        held = layer.keys.shape[-2] - padding
    meta_columns = getattr(layer, "meta_columns", None)
    return held if meta_columns is None else held + (meta_columns >= 0).sum(-1)


def check_evictable(model: Any) -> None:
    """Refuse a model whose columns cannot be dropped from outside.

    Raises:
        UsageError: it takes no positions, so dropping columns would shift them; a layer sees less than the whole past;
            or its attention takes no mask of who sees whom.
    """
    config = _text_config(model)
    found = None
    if hasattr(model, GRAFT):
        found = "a grafted one, which drops columns by itself"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        found = "one that takes no position_ids"
    elif (encoding := getattr(config, "position_encoding", None)) in BIASES:
        found = f"one whose positions ({encoding}) are counted in columns"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        found = f"layers of another kind ({', '.join(sorted(kinds)) or 'a sliding window'})"
    elif "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        found = "layers of another kind (local, whose windows are counted in columns)"
    implementation = getattr(model.config, "_attn_implementation", "eager")
    if implementation not in ("eager", "sdpa"):
        found = f"attention by {implementation}"
    if found is not None:
        raise UsageError(
            type(model).__name__,
            expected="a decoder of full attention by sdpa or eager, with positions, for a policy that drops columns",
            found=found,
            remedy="evaluate it with the policy full alone",
        )


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()
