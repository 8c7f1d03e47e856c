"""Meta-tokens for a decoder of transformers, by hooks: nothing of its code or of its weights is changed.

A hook in front of the decoder turns T columns of input into W with anchors (`spreading.py`), gives the mask and fits
the cache; a hook behind it returns the states of the T columns. So the model takes and returns text: its head, its loss
and `generate` know nothing of anchors. New are

- one row, zero at the start: an anchor's embedding is that of the token before it plus this row;
- for every matrix of a block a change of low rank (LoRA: Hu et al. 2022) that acts at anchors alone, zero at the start;
- if wanted, meta-attention (`meta_attention.py`), by hooks on a block's first norm and on its attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from metatokens.config.graft import GraftConfig
from metatokens.errors import UsageError
from metatokens.graft.attending import (
    ARGUMENT,
    IMPLEMENTATION,
    compact_clocks,
    make_mask,
    rotation_of,
)
from metatokens.graft.cache import is_filled, new_cache, state_of
from metatokens.graft.families import Family, check_compact, check_meta_attention, family_of
from metatokens.graft.meta_attention import AnchorAttention, Pack, pack_anchors
from metatokens.graft.spreading import Spread, policy_of, spread, visible
from metatokens.model.compatibility import CACHE_NAME, CACHE_NAMES, checkpoint_blocks, find_cache
from metatokens.model.memory import CHUNK, Columns, MemoryPolicy

NAME = "metatokens_graft"
"""The module of the model that holds what is new."""


class Graft(nn.Module):
    """The new parameters of a grafted model and the pass that is under way.

    Attributes:
        config: of the graft.
        row: (C,) added to the embedding of the token before an anchor.
        down: (rank, in) for each matrix, by its name in the decoder with "-" for ".".
        up: (out, rank) likewise.
        meta_attn: the meta-attention of each block, if there is any.
        is_on: whether the hooks do anything.
    """

    def __init__(self, config: GraftConfig, family: Family, decoder: Any) -> None:
        """Draw the new parameters, which are in float32 where the model is in half precision."""
        super().__init__()
        self.config, self.family, self.is_on = config, family, True
        self.handles: list[Any] = []
        self.trained_before: dict[str, bool] = {}
        embedding = decoder.get_input_embeddings().weight
        factory: dict[str, Any] = {
            "dtype": torch.promote_types(embedding.dtype, torch.float32),
            "device": embedding.device,
        }
        self.row = nn.Parameter(torch.zeros(embedding.shape[1], **factory))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(config.seed)
        for name, matrix in family.matrices_of(decoder) if config.lora_rank else ():
            num_out, num_in = _shape(matrix)
            drawn = torch.randn(config.lora_rank, num_in, generator=generator) / num_in**0.5
            self.down[_key(name)] = nn.Parameter(drawn.to(**factory))
            self.up[_key(name)] = nn.Parameter(torch.zeros(num_out, config.lora_rank, **factory))
        self.meta_attn = nn.ModuleList(
            AnchorAttention(decoder.config, generator, factory)
            for _ in (family.blocks_of(decoder) if config.meta_attention else ())
        )
        self.spread: Spread | None = None
        """Of the pass under way."""
        self._anchors: tuple[Tensor, Tensor] | None = None
        self._too_far: dict[int, Tensor] = {}
        self._pack: Pack | None = None
        self._held: Tensor | None = None
        self._own_attention: str | None = None
        self._model_config = decoder.config
        self.recomputes = False
        """Whether blocks that run anew in the backward pass do so in `recomputing`."""

    def attach(self, decoder: Any) -> None:
        """Hang the hooks on a decoder."""
        hang = self.handles.append
        hang(decoder.register_forward_pre_hook(self._before, with_kwargs=True))
        hang(decoder.register_forward_hook(self._behind, always_call=True))
        for name, matrix in self.family.matrices_of(decoder):
            if _key(name) in self.down:
                hang(matrix.register_forward_hook(partial(self._change, _key(name))))
        for block in self.family.blocks_of(decoder):
            if self.family.own_mask:
                self._replace_mask(block)
        for index in range(len(self.meta_attn)):
            self._attach_meta_attention(index, self.family.blocks_of(decoder)[index])

    def _before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _by_name(decoder, args, kwargs)
        cache = find_cache(given)
        if not self.is_on:
            if is_filled(cache):
                raise _refusal("a new cache while the graft is switched off", "one that the graft has filled")
            return None
        self._check_input(decoder, given)
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            embeddings = decoder.get_input_embeddings()(given["input_ids"])
        num_rows, num_columns = embeddings.shape[:2]
        mask, position_ids = given.get("attention_mask"), given.get("position_ids")
        is_real = torch.ones(num_rows, num_columns, dtype=torch.bool, device=embeddings.device)
        if mask is not None:
            is_real &= mask[:, -num_columns:].bool()
        _check_positions(position_ids, is_real)
        layers = self.family.blocks_of(decoder)
        wants_cache = given.get("use_cache")
        wants_cache = decoder.config.use_cache and not decoder.training if wants_cache is None else wants_cache
        if cache is None and wants_cache:
            cache = new_cache(policy_of(self.config), len(layers))
        state = None if cache is None else state_of(cache, self.config, len(layers))
        before = None if state is None else state.counts
        found = spread(self.config, is_real, position_ids=position_ids, before=before)
        self._check_length(decoder, found.tokens, num_columns + (0 if state is None else state.num_columns))
        keys = found.tokens
        if state is not None:
            keys, state.num_columns = state.read(found.tokens), state.num_columns + num_columns
        self._begin(found, keys, layers, cache)
        given = {name: value for name, value in given.items() if name not in (*CACHE_NAMES, "input_ids")}
        is_compact = self.config.positions == "compact"
        if is_compact or self._is_long(decoder):
            rotate = rotation_of(decoder, embeddings) if is_compact else None
            mask = make_mask(self.config, found.tokens, keys, rotate)
            # one of four dimensions is passed on as it is
            given |= {ARGUMENT: mask, "attention_mask": embeddings.new_zeros(1, 1, 1, 1)}
            self._own_attention = decoder.config._attn_implementation
            decoder.config._attn_implementation = IMPLEMENTATION
        else:
            pairs = visible(self.config, found.tokens, keys)[:, None]
            # the form that both sdpa and eager attention take
            lowest = torch.finfo(embeddings.dtype).min
            given["attention_mask"] = embeddings.new_zeros(pairs.shape).masked_fill(~pairs, lowest)
        # at position 0 nothing is rotated
        given["position_ids"] = torch.zeros_like(found.tokens.positions) if is_compact else found.tokens.positions
        given["inputs_embeds"] = self._add(found.apply(embeddings), self.row.expand(self._num_anchors, -1))
        given["use_cache"] = cache is not None
        if cache is not None:
            given[CACHE_NAME] = cache
        return (), given

    def _is_long(self, decoder: Any) -> bool:
        """Tell whether the pass under way is worth a plan of what its queries visit."""
        assert self.spread is not None
        is_open = decoder.config._attn_implementation == "sdpa" and not self.family.own_mask
        return is_open and self.spread.is_anchor.shape[1] > CHUNK

    def _begin(self, found: Spread, keys: Columns, layers: list[Any], cache: Any) -> None:
        rows, columns = found.is_anchor.nonzero(as_tuple=True)
        self.spread, self._anchors = found, (rows, columns)
        queries = found.tokens
        windows = {window for layer in layers if (window := self.family.local_window(layer)) is not None}
        distance = queries.positions[:, None, :, None] - keys.positions[:, None, None]
        self._too_far = {window: distance >= window for window in windows}
        if self.meta_attn and self._num_anchors:
            # the layers hold the same anchors
            cached = None if cache is None else cache.layers[0].meta_columns
            limit = self.config.memory_limit
            self._pack = pack_anchors(found.is_anchor, queries.order, self._anchors, cached=cached, limit=limit)

    @property
    def _num_anchors(self) -> int:
        return 0 if self._anchors is None else len(self._anchors[0])

    def _add(self, states: Tensor, change: Tensor) -> Tensor:
        """Return states (B, W, C) with a change (anchors, C) added at the anchors."""
        assert self._anchors is not None
        return states.index_put(self._anchors, change.to(states.dtype), accumulate=True)

    def _change(self, key: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.spread is None or not self._num_anchors:
            return None
        anchors = args[0][self._anchors]
        down, up = (matrices[key].to(anchors.dtype) for matrices in (self.down, self.up))
        return self._add(output, nn.functional.linear(nn.functional.linear(anchors, down), up))

    def _attach_meta_attention(self, index: int, block: Any) -> None:
        assert self.family.around_attention is not None
        first, attention, second = map(block.get_submodule, self.family.around_attention)
        # not on the block itself: gradient checkpointing runs its inside anew, without its own hooks
        self.handles.append(first.register_forward_pre_hook(self._hold))
        behind = partial(self._attend_among_anchors, index, second)
        self.handles.append(attention.register_forward_hook(behind, with_kwargs=True))

    def _hold(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the anchors of what a block was given, which its attention is added to."""
        del norm
        if self._pack is not None:
            self._held = self._pack.take(args[0])

    def _attend_among_anchors(
        self, index: int, norm: nn.Module, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        del args
        if self._pack is None:
            return output
        held, self._held = self._held, None
        assert held is not None
        states, *rest = output
        cache = next((kwargs[name] for name in (*CACHE_NAMES, "layer_past") if kwargs.get(name) is not None), None)
        change = self.meta_attn[index](
            norm(held + self._pack.take(states)),
            self._pack,
            rotary=kwargs.get("position_embeddings") if getattr(module, "use_rope", True) else None,
            layer=None if cache is None else cache.layers[index],
        )
        return (self._add(states, change), *rest)

    def _replace_mask(self, block: Any) -> None:
        """Let a window that a block counts in columns count positions, since columns are dropped and added."""
        holder = block.get_submodule(self.family.own_mask)
        before = partial(self._before_own_mask, self.family.local_window(block))
        self.handles.append(holder.register_forward_pre_hook(before, with_kwargs=True))
        behind = partial(self._behind_own_mask, holder.bias)
        self.handles.append(holder.register_forward_hook(behind, always_call=True))

    def _before_own_mask(
        self, window: int | None, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.spread is None:
            return None
        pairs = kwargs["attention_mask"]
        num_keys = pairs.shape[-1]
        # of all columns, in the memory of one
        module.bias = module.bias.new_ones(1, 1, 1, 1).expand(1, 1, num_keys, num_keys)
        if window is not None:
            pairs = pairs.masked_fill(self._too_far[window], torch.finfo(pairs.dtype).min)
        return args, {**kwargs, "attention_mask": pairs}

    @staticmethod
    def _behind_own_mask(own: Tensor, module: Any, args: tuple[Any, ...], output: Any) -> None:
        del args, output
        module.bias = own.to(module.bias.device)

    def _behind(self, decoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        del args
        if self._own_attention is not None:
            decoder.config._attn_implementation, self._own_attention = self._own_attention, None
        found, self.spread, self._anchors, self._too_far = self.spread, None, None, {}
        self._pack = self._held = None
        if found is None or output is None:
            return output
        if isinstance(output, tuple):
            # a tuple in it is of hidden states: attentions are refused, a cache is none
            rest = (tuple(map(found.undo, part)) if isinstance(part, tuple) else part for part in output[1:])
            return (found.undo(output[0]), *rest)
        output.last_hidden_state = found.undo(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(found.undo(states) for states in output.hidden_states)
        return output

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a part that gradient checkpointing runs now, and once more in the backward pass.

        Then the pass under way is over, so the second context brings back what the hooks and the attention of that
        part read of it.
        """
        return nullcontext(), self._back_in(self._under_way, self._model_config._attn_implementation)

    @contextmanager
    def _back_in(self, under_way: Any, attention: str) -> Iterator[None]:
        before = self._under_way, self._model_config._attn_implementation
        self._under_way, self._model_config._attn_implementation = under_way, attention
        try:
            yield
        finally:
            self._under_way, self._model_config._attn_implementation = before

    @property
    def _under_way(self) -> tuple[Any, ...]:
        """What the hooks inside of blocks read of a pass."""
        return self.spread, self._anchors, self._too_far, self._pack

    @_under_way.setter
    def _under_way(self, known: tuple[Any, ...]) -> None:
        self.spread, self._anchors, self._too_far, self._pack = known

    def _check_input(self, decoder: Any, given: dict[str, Any]) -> None:
        mask = given.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise _refusal("attention_mask (batch, tokens), 0 at padding", "a mask of another form")
        for name in ("token_type_ids", "encoder_hidden_states"):
            if given.get(name) is not None:
                raise _refusal("text alone", name)
        if given.get("output_attentions", decoder.config.output_attentions):
            raise _refusal("no output_attentions, since anchors have rows and columns in them", "output_attentions")
        parts = (decoder, *self.family.blocks_of(decoder))
        forgets = not self.recomputes and any(getattr(part, "gradient_checkpointing", False) for part in parts)
        if decoder.training and forgets:
            raise _refusal(
                "gradient checkpointing by metatokens.graft.enable_gradient_checkpointing", "the model's own"
            )

    def _check_length(self, decoder: Any, tokens: Columns, num_columns: int) -> None:
        limit = getattr(decoder.config, "max_position_embeddings", None)
        if limit is None or num_columns <= limit:
            return
        if self.config.positions == "compact":
            _, _, to_sinks, _ = compact_clocks(self.config, tokens, tokens)
            longest, remedy = int(to_sinks.max()) + 1, "set memory_limit, or raise every"
        else:
            longest, remedy = int(tokens.positions.max()) + 1, 'give a shorter text, or graft with positions "compact"'
        if longest > limit:
            raise UsageError(
                "text of a grafted model",
                expected=f"at most the {limit} positions of the model",
                found=f"{longest}",
                remedy=remedy,
            )


def graft(model: Any, config: GraftConfig | None = None, *, tokenizer: Any = None) -> Any:
    """Give a decoder of transformers anchors and memory mode, in place; returns the model.

    It takes and returns text as before, anchors are put in by itself. What was there is frozen; only the module
    `metatokens_graft`, a `Graft`, is left to train. Text beyond the window is dropped from the cache.

    Args:
        model: a decoder of one of the families in `metatokens.graft.families.FAMILIES`.
        config: by default `GraftConfig()`.
        tokenizer: checked against the model's embedding, if given.

    Raises:
        UsageError: the model cannot be grafted, has been already, or does not match the tokenizer.
    """
    family, config = family_of(model), config or GraftConfig()
    if hasattr(model, NAME):
        raise UsageError(
            type(model).__name__, expected="a plain model", found="a grafted one", remedy="call ungraft first"
        )
    num_ids = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > num_ids:
        raise UsageError(
            "tokenizer",
            expected=f"at most the {num_ids} ids of the model's embedding",
            found=f"{len(tokenizer)}",
            remedy="give the tokenizer that belongs to the model",
        )
    decoder = model.base_model
    if config.positions == "compact":
        check_compact(model)
    if config.meta_attention:
        check_meta_attention(model)
    added = Graft(config, family, decoder)
    for name, parameter in model.named_parameters():
        added.trained_before[name] = parameter.requires_grad
        parameter.requires_grad_(False)
    model.add_module(NAME, added)
    added.train(model.training)
    added.attach(decoder)
    return model


def ungraft(model: Any) -> Any:
    """Take the graft away, in place; returns the model as it was.

    Raises:
        UsageError: the model has none.
    """
    added = graft_of(model)
    for handle in added.handles:
        handle.remove()
    delattr(model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(added.trained_before.get(name, parameter.requires_grad))
    return model


def enable_gradient_checkpointing(model: Any) -> None:
    """Let the blocks of a grafted model compute their activations anew in the backward pass, to save memory.

    Raises:
        UsageError: the model has no graft.
    """
    added = graft_of(model)
    added.recomputes = True
    checkpoint_blocks(model, {"use_reentrant": False, "context_fn": added.recomputing})


@contextmanager
def switched_off(model: Any) -> Iterator[Any]:
    """Let a grafted model compute what the plain one does, bit for bit, for a while.

    Raises:
        UsageError: the model has no graft.
    """
    added = graft_of(model)
    was_on, added.is_on = added.is_on, False
    try:
        yield model
    finally:
        added.is_on = was_on


def memory_of(model: Any) -> tuple[MemoryPolicy, DynamicCache] | None:
    """Return the policy and an empty cache of a grafted model, or of an arm that wraps one; None for any other."""
    plain = getattr(model, "wrapped", model)
    added = getattr(plain, NAME, None)
    if added is None:
        return None
    policy = policy_of(added.config)
    return policy, new_cache(policy, len(added.family.blocks_of(plain.base_model)))


def graft_of(model: Any) -> Graft:
    """Return the graft of a model.

    Raises:
        UsageError: it has none.
    """
    if not hasattr(model, NAME):
        raise UsageError(
            type(model).__name__, expected="a grafted model", found="a plain one", remedy="call graft first"
        )
    return cast("Graft", getattr(model, NAME))


def _key(name: str) -> str:
    return name.replace(".", "-")


def _shape(matrix: Any) -> tuple[int, int]:
    """Return the numbers of outputs and of inputs; GPT-2's matrices are stored the other way round."""
    if isinstance(matrix, nn.Linear):
        return matrix.out_features, matrix.in_features
    num_in, num_out = matrix.weight.shape
    return num_out, num_in


def _by_name(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    rest = bound.pop("kwargs", {})
    return {name: value for name, value in {**bound, **rest}.items() if value is not None}


def _refusal(expected: str, found: str) -> UsageError:
    return UsageError("input of a grafted model", expected=expected, found=found, remedy="change the call")


def _check_positions(position_ids: Tensor | None, is_real: Tensor) -> None:
    if position_ids is None or is_real.shape[1] == 1:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if bool((falls & is_real[:, 1:] & is_real[:, :-1]).any()):
        raise _refusal("one document a row", "position_ids that start anew")
