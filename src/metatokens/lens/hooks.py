"""The hooks of the lens: they hang on the modules that the requests need, and on no other, until they are removed.

No module is patched and no attention implementation is changed. An attention of this package is handed a `Rotary`;
the lens wraps it and so sees queries and keys as the scores use them. Without rotation these are the projections.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatokens.baselines.blocks import BlockPlan
from metatokens.errors import UsageError
from metatokens.graft.attending import IMPLEMENTATION as PLANNED
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.graft.grafting import graft_of
from metatokens.graft.spreading import places_of
from metatokens.lens.activations import AttentionCall, Captured
from metatokens.lens.edits import EdgeCut, Edit
from metatokens.lens.layout import PROJECTION_TAPS, ROTATED_TAPS, AttentionSite, BlockSite, Layout
from metatokens.lens.masks import cut_mask, window_mask
from metatokens.model.compatibility import find_cache
from metatokens.model.configuration import ADAPTIVE
from metatokens.model.memory import MemoryMask

_MASKS_ARE_TENSORS = ("eager", "sdpa")
UNREADABLE = (*ADAPTIVE, "transformer_xl")
"""Position encodings under which scores do not follow from the rotated queries and keys and the mask."""

Observer = Callable[[AttentionCall], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Requests:
    """What one context asks of a model. Compared by identity: two contexts may ask for the same."""

    edits: Sequence[Edit] = ()
    cuts: Sequence[EdgeCut] = ()
    captures: Sequence[Captured] = ()
    observers: Sequence[Observer] = ()


def match_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names of taps that match a pattern; `*` stands for any text."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


@dataclasses.dataclass
class _Forward:
    """The forward pass that is under way."""

    columns: Tensor
    """(B, T) int64: the column in the sequence of each token; of a graft (B, W), with its anchors."""
    text_columns: Tensor
    """(B, T) int64: of the tokens of the input."""
    kept: int | Tensor
    """Which of these get logits, as `logits_to_keep` of a model."""
    num_seen: int
    """Tokens in the cache before it."""
    pack: Any = None
    """The packed meta-tokens."""
    masks: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the attention that is running, by branch."""
    scored: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Its queries and keys, where they are not rotated."""
    middle: Tensor | None = None
    """The middle of the residual stream of the block that is running, if it was changed."""
    mlp_out: Tensor | None = None

    @property
    def logit_columns(self) -> Tensor:
        """(B, T') int64: of the tokens that get logits."""
        return self.text_columns[:, slice(-self.kept, None) if isinstance(self.kept, int) else self.kept]


class _TappedRotary:
    """Rotates as the one that it wraps does, and shows what comes out."""

    def __init__(self, rotary: Any, look: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._rotary, self._look = rotary, look

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if self._rotary is not None:
            query_BHTD, key_BHTD = self._rotary.apply(query_BHTD, key_BHTD)
        return self._look(query_BHTD, key_BHTD)


def named_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a call by name, as a hook before it is handed them."""
    return inspect.signature(module.forward).bind_partial(*args).arguments | kwargs


class ModuleHooks(ExitStack):
    """Hooks on modules until it is closed: whatever edits or looks at a model hangs its hooks here."""

    def _hook(self, module: nn.Module, *, before: Any = None, after: Any = None, always: bool = False) -> None:
        """Call `before` and `after` around a module's forward; with `always`, `after` also where it raises."""
        if before is not None:
            self.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self.enter_context(module.register_forward_hook(after, always_call=always))


class Hooks(ModuleHooks):
    """The hooks that some requests need on a model."""

    def __init__(self, model: PreTrainedModel, layout: Layout, requests: Sequence[Requests]) -> None:
        """Hang them up; edits act in the order of the requests."""
        super().__init__()
        self._model, self._layout = model, layout
        self._cuts = tuple(cut for request in requests for cut in request.cuts)
        self._observers = tuple(observer for request in requests for observer in request.observers)
        self._edits: dict[str, list[Edit]] = {}
        for edit in (edit for request in requests for edit in request.edits):
            for name in match_names(layout.tap_names, edit.name):
                self._edits.setdefault(name, []).append(edit)
        self._captures: dict[str, list[Captured]] = {}
        for captured in (captured for request in requests for captured in request.captures):
            for name in captured.names:
                self._captures.setdefault(name, []).append(captured)
        self._current: _Forward | None = None
        if self._edits or self._captures or self._cuts or self._observers:
            self._install()

    def _wants(self, *names: str) -> bool:
        return any(name in self._edits or name in self._captures for name in names)

    # firing --------------------------------------------------------------------------------------------------------

    @property
    def _forward(self) -> _Forward:
        if self._current is None:
            raise ValueError("the lens needs a forward pass of the whole model; call lens(...)")
        return self._current

    def _fire(self, name: str, value: Tensor, columns: Tensor | None = None) -> Tensor:
        """Edit and keep an activation (B, T, ...); an unchanged one comes back itself."""
        columns = self._forward.columns if columns is None else columns
        value = self._edit(name, value, columns)
        self._keep(name, value, columns)
        return value

    def _edit(self, name: str, value: Tensor, columns: Tensor) -> Tensor:
        for edit in self._edits.get(name, ()):
            value = edit.change(value, columns)
        return value

    def _keep(self, name: str, value: Tensor, columns: Tensor) -> None:
        for captured in self._captures.get(name, ()):
            captured.store(name, value, columns)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = named_inputs(model, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return  # the model refuses it
        past, kept = find_cache(inputs), inputs.get("logits_to_keep", 0)
        seen = 0 if past is None else past.get_seq_length()
        implementation = self._model.config._attn_implementation
        if not isinstance(seen, int):
            raise ValueError(f"the lens needs a cache that grows, such as a DynamicCache, not {type(past).__name__}")
        if self._cuts and implementation not in _MASKS_ARE_TENSORS:
            raise UsageError(
                "attention implementation of a model with cut edges",
                expected=f"{' or '.join(_MASKS_ARE_TENSORS)}, whose masks are tensors",
                found=str(implementation),
                remedy='call model.set_attn_implementation("sdpa")',
            )
        if self._observers and not self._scores_are_readable():
            raise UsageError(
                "model whose attention is observed",
                expected="scores that follow from rotated queries, keys and a mask that the lens sees",
                found=getattr(self._model.config, "position_encoding", self._model.config.model_type),
                remedy="load the model with attn_implementation eager and ask for output_attentions",
            )
        columns = (torch.arange(tokens.shape[1], device=tokens.device) + seen).expand(tokens.shape[:2])
        self._current = _Forward(columns, columns, kept, seen)

    def _scores_are_readable(self) -> bool:
        sites = (site for block in self._layout.blocks for site in block.attentions)
        rotates_in_sight = all(set(ROTATED_TAPS.values()) <= set(site.taps) for site in sites)
        return rotates_in_sight and getattr(self._model.config, "position_encoding", None) not in UNREADABLE

    def _follow_graft(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the columns of a grafted decoder's pass, which its own hook has spread by now."""
        del args, kwargs
        graft = graft_of(self._model)
        if graft.spread is None:
            return  # switched off
        if (self._cuts or self._observers) and decoder.config._attn_implementation == PLANNED:
            raise UsageError(
                "attention of a grafted model with cut edges, or observed",
                expected='a mask that is a tensor: by eager attention, with positions "text"',
                found="a plan of what its queries visit",
                remedy='call model.set_attn_implementation("eager")',
            )
        if self._cuts and self._forward.num_seen:
            raise ValueError(
                f"edges of a graft are cut in a pass without a cache, not behind {self._forward.num_seen} tokens"
            )
        columns = places_of(graft.config, graft.spread.tokens)
        self._forward.columns, self._forward.text_columns = columns, graft.spread.undo(columns)

    def _end(self, *_: Any) -> None:
        self._current = None

    # hanging up ----------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._hook(self._model, before=self._begin, after=self._end, always=True)
        if hasattr(self._model, GRAFT):
            self._hook(self._model.base_model, before=self._follow_graft)
        for layer, site in enumerate(self._layout.blocks):
            self._install_block(layer, site)
            for attention in site.attentions:
                self._install_attention(attention)
        if self._wants("ln_final.hook_normalized"):
            self._hook(self._layout.final_norm, after=lambda _, __, out: self._fire("ln_final.hook_normalized", out))
        if self._wants("unembed.hook_logits"):

            def unembed(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
                # a loss wants the logits of all tokens, whichever are kept
                columns, kept = self._forward.text_columns, self._forward.logit_columns
                return self._fire("unembed.hook_logits", logits, kept if logits.shape[1] == kept.shape[1] else columns)

            self._hook(self._layout.head, after=unembed)

    def _install_block(self, layer: int, site: BlockSite) -> None:
        taps = ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        pre, middle, mlp_out, post = (f"blocks.{layer}.{tap}" for tap in taps)
        moves_middle = middle in self._edits
        if self._wants(pre) or (layer == 0 and self._wants("embed.hook_embed")):
            self._hook(site.block, before=partial(self._enter_block, layer, pre))
        if site.mlp_norm is not None and self._wants(middle):
            self._hook(site.mlp_norm, before=partial(self._fire_middle, middle))
        if self._wants(mlp_out) or moves_middle:
            self._hook(site.mlp, after=partial(self._fire_mlp, mlp_out))
        if self._wants(post) or moves_middle:
            self._hook(site.block, after=partial(self._leave_block, post))

    def _install_attention(self, site: AttentionSite) -> None:
        cuts = [
            cut for cut in self._cuts if cut.branch == site.branch and (cut.layers is None or site.layer in cut.layers)
        ]
        shows_scores = bool(self._observers) or self._wants(*(f"{site.prefix}.{tap}" for tap in ROTATED_TAPS.values()))
        shows_projections = self._wants(*(f"{site.prefix}.{tap}" for tap in PROJECTION_TAPS))
        shows_heads = self._wants(f"{site.prefix}.hook_z")
        shows_output = self._wants(site.output_tap)
        if not (cuts or shows_scores or shows_projections or shows_heads or shows_output):
            return
        self._hook(site.module, before=partial(self._enter_attention, site, cuts, shows_scores))
        if shows_output:
            self._hook(site.module, after=partial(self._leave_attention, site))
        if shows_heads:
            self._hook(site.output, before=partial(self._fire_heads, site))
        if shows_projections or (shows_scores and site.rotary_argument is None):
            taps = [(tap,) for tap in PROJECTION_TAPS] if len(site.projections) > 1 else [PROJECTION_TAPS]
            for module, made in zip(site.projections, taps, strict=True):
                self._hook(module, after=partial(self._fire_projections, site, made))

    # blocks --------------------------------------------------------------------------------------------------------

    def _enter_block(self, layer: int, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = self._fire("embed.hook_embed", args[0]) if layer == 0 else args[0]
        changed = self._fire(name, changed)
        return None if changed is args[0] else ((changed, *args[1:]), kwargs)

    def _fire_middle(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = self._fire(name, args[0])
        if changed is args[0]:
            return None
        self._forward.middle = changed
        return (changed, *args[1:]), kwargs

    def _fire_mlp(self, name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        self._forward.mlp_out = self._fire(name, output)
        return self._forward.mlp_out

    def _leave_block(self, name: str, _: nn.Module, __: Any, output: Any) -> Any:
        hidden = changed = output[0] if isinstance(output, tuple) else output
        if self._forward.middle is not None:
            # the block added its feed-forward part to the middle as it was before the change
            assert self._forward.mlp_out is not None
            changed, self._forward.middle = self._forward.middle + self._forward.mlp_out, None
        changed = self._fire(name, changed)
        if changed is hidden:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # attentions ----------------------------------------------------------------------------------------------------

    def _columns_of(self, site: AttentionSite) -> Tensor:
        columns: Tensor = self._forward.columns if site.branch == "attn" else self._forward.pack.columns
        return columns

    def _enter_attention(
        self,
        site: AttentionSite,
        cuts: Sequence[EdgeCut],
        shows_scores: bool,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note the mask of an attention, and return its arguments with the edges cut and the rotation tapped."""
        arguments = _Arguments(args, kwargs)
        given = arguments.get(site.mask_argument)
        if isinstance(given, MemoryMask) and (cuts or self._observers):
            given = given.dense()  # the edges one by one
            arguments.set(site.mask_argument, given)
        elif isinstance(given, BlockPlan) and (cuts or self._observers):
            given = given.dense(self._columns_of(site).shape[1])
            arguments.set(site.mask_argument, given)
        look = partial(self._look_at_rotated, site)
        if site.branch == "attn":
            new = mask = self._cut(site, cuts, given, arguments)
            if shows_scores and site.rotary_argument is not None:
                arguments.set(site.rotary_argument, _TappedRotary(arguments.get(site.rotary_argument), look))
        else:
            self._forward.pack = given
            mask = self._cut(site, cuts, given.mask, arguments)
            rotary = _TappedRotary(given.rotary, look) if shows_scores else given.rotary
            new = given._replace(mask=mask, rotary=rotary) if cuts or shows_scores else given
        if self._observers:
            self._forward.masks[site.branch] = mask
        if new is not given:
            arguments.set(site.mask_argument, new)
        return (arguments.args, arguments.kwargs) if arguments.is_changed else None

    def _cut(self, site: AttentionSite, cuts: Sequence[EdgeCut], mask: Any, arguments: _Arguments) -> Any:
        if not cuts:
            return mask
        columns = self._columns_of(site)
        if site.branch == "attn":
            num_keys = self._forward.num_seen + columns.shape[1]
            key_columns = torch.arange(num_keys, device=columns.device).expand(len(columns), -1)
        else:
            cache = arguments.get(site.cache_argument)
            cached = None if cache is None else cache.layers[site.layer].meta_columns
            key_columns = columns if cached is None else torch.cat([cached, columns], dim=1)
        return cut_mask(mask, cuts, columns, key_columns)

    def _leave_attention(self, site: AttentionSite, _: nn.Module, __: Any, output: tuple[Any, ...]) -> Any:
        if site.branch == "attn":
            changed = self._fire(site.output_tap, output[0])
            return None if changed is output[0] else (changed, *output[1:])
        pack, columns = self._forward.pack, self._forward.columns
        empty = output[0].new_zeros((*columns.shape, output[0].shape[-1]))
        full = pack.add(empty, output[0])
        changed = self._edit(site.output_tap, full, columns)
        rows = output[0] if changed is full else pack.gather(changed)
        # a token that takes no part gets nothing, even from an edit
        self._keep(site.output_tap, full if changed is full else pack.add(empty, rows), columns)
        return None if changed is full else (rows, *output[1:])

    def _fire_projections(
        self, site: AttentionSite, taps: tuple[str, ...], _: nn.Module, __: Any, output: Tensor
    ) -> Tensor | None:
        """Tap queries, keys and values where they are made; without rotation the scores use them as they are."""
        columns = self._columns_of(site)
        # keys and values may have fewer heads
        made = [part.unflatten(-1, (-1, site.head_dim)) for part in output.chunk(len(taps), dim=-1)]
        heads = {tap: self._fire(f"{site.prefix}.{tap}", part, columns) for tap, part in zip(taps, made, strict=True)}
        if site.rotary_argument is None and "hook_rot_q" in site.taps:
            for tap in (tap for tap in taps if tap in ROTATED_TAPS):
                heads[tap] = self._fire(f"{site.prefix}.{ROTATED_TAPS[tap]}", heads[tap], columns)
            if self._observers:
                self._observe_when_complete(site, heads)
        if all(new is old for new, old in zip(heads.values(), made, strict=True)):
            return None
        return torch.cat([part.flatten(-2) for part in heads.values()], dim=-1)

    def _observe_when_complete(self, site: AttentionSite, heads: dict[str, Tensor]) -> None:
        scored = self._forward.scored
        scored.update((tap, part) for tap, part in heads.items() if tap in ROTATED_TAPS)
        if len(scored) == len(ROTATED_TAPS):
            query, key = (scored.pop(tap).transpose(1, 2) for tap in ROTATED_TAPS)
            self._observe(site, query, key)

    def _look_at_rotated(self, site: AttentionSite, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        rotated = []
        columns = self._columns_of(site)
        for tap, heads_BHTD in zip(ROTATED_TAPS.values(), (query_BHTD, key_BHTD), strict=True):
            heads = heads_BHTD.transpose(1, 2)
            changed = self._fire(f"{site.prefix}.{tap}", heads, columns)
            rotated.append(heads_BHTD if changed is heads else changed.transpose(1, 2))
        query, key = rotated
        if self._observers:
            self._observe(site, query, key[..., : query.shape[-1]])  # see `Rotary.apply`
        return query, key

    def _observe(self, site: AttentionSite, query: Tensor, key: Tensor) -> None:
        if self._forward.num_seen:
            raise ValueError(
                f"an observed forward pass starts without a cache, not behind {self._forward.num_seen} tokens"
            )
        columns, mask = self._columns_of(site), self._forward.masks[site.branch]
        if site.window is not None:
            mask = window_mask(mask, site.window, columns)
        call = AttentionCall(site.layer, site.branch, query, key, mask, site.scaling, columns)
        for observer in self._observers:
            observer(call)

    def _fire_heads(self, site: AttentionSite, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        columns = self._columns_of(site)
        heads = args[0].unflatten(-1, (site.num_heads, site.head_dim))
        changed = self._fire(f"{site.prefix}.hook_z", heads, columns)
        return None if changed is heads else ((changed.flatten(-2), *args[1:]), kwargs)


class _Arguments:
    """The arguments of a call, by place or by name."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.is_changed = False

    def get(self, which: tuple[int, str]) -> Any:
        place, name = which
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)

    def set(self, which: tuple[int, str], value: Any) -> None:
        place, name = which
        if len(self.args) > place:
            self.args = (*self.args[:place], value, *self.args[place + 1 :])
        else:
            self.kwargs = {**self.kwargs, name: value}
        self.is_changed = True
