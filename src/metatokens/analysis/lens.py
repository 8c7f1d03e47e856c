"""The lens: read and change what a model computes, by name and by position, without touching its weights.

    lens = Lens(model.eval())
    with lens.capture(["blocks.*.hook_resid_post"], at=is_meta) as captured:
        lens(input_ids)
    captured["blocks.3.hook_resid_post"]                        # (number of meta-tokens, C)
    with lens.edit(ops.cut_edges(None, query=is_answer, key=is_meta)):
        logits = lens(input_ids).logits

Taps of a block, in the order in which they fire, with their shapes:

    hook_resid_pre                        (B, T, C)
    attn.hook_q, .hook_k, .hook_v         (B, T, H, D)   before rotation
    attn.hook_rot_q, .hook_rot_k          (B, T, H, D)   as the scores use them
    attn.hook_z                           (B, T, H, D)   weighted values
    attn.hook_result                      (B, T, H, C)   what each head adds, without the projection's bias; read only
    hook_attn_out                         (B, T, C)
    meta_attn.hook_q ... hook_result      (B, M, H, ...) of the packed meta-tokens
    hook_meta_out                         (B, T, C)      zero at every other token
    hook_resid_mid, hook_mlp_out, hook_resid_post        (B, T, C)

and `embed.hook_embed` (what enters the first block), `ln_final.hook_normalized`, `unembed.hook_logits`. Block l has the
prefix `blocks.l.`. Each fires once a forward pass; those of meta-attention only where there are meta-tokens.

Hooks are hung on the modules that requested taps need, and gone with the context. With nothing changed the logits keep
their bits. Not under `torch.compile`, nor with a static cache.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metatokens.analysis.layout import AttentionSite, BlockSite, Branch, describe_layout
from metatokens.analysis.ops import EdgeCut, Edit
from metatokens.errors import UsageError

_QKV = ("hook_q", "hook_k", "hook_v")
_BRANCH_TAPS = (*_QKV, "hook_rot_q", "hook_rot_k", "hook_z", "hook_result")


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What one attention is about to compute, for `Lens.observe`."""

    layer: int
    branch: Branch
    query_BHTD: Tensor
    """Rotated; without a cache."""
    key_BHTD: Tensor
    mask: Any
    """None for plain causal attention, bool (True = keep) or additive, (B or 1, 1 or H, T, T). It holds all that the
    attention hides, also what it hides by itself, as GPT-Neo's local layers do."""
    scaling: float
    columns: Tensor
    """(B, T) int64: the column in the sequence of each token; -1 where a row of packed meta-tokens has none."""


class Captured:
    """Activations that one forward pass left, by the names of their taps.

    With `at`, each is packed to the selected tokens, (n, ...), in the order of `index`; else as it is, (B, T, ...).
    """

    def __init__(self, names: frozenset[str], at: Tensor | None, dtype: torch.dtype | None, device: str | None) -> None:
        """Wait for the taps of these names."""
        self.names, self.at, self.dtype, self.device = names, at, dtype, device
        self.meta_columns: Tensor | None = None
        """(B, M) int64, the column of each packed meta-token, -1 for padding; None without a tap of meta-attention."""
        self._values: dict[str, Tensor] = {}

    @property
    def index(self) -> Tensor:
        """(n, 2) int64, row and column of each selected token."""
        assert self.at is not None, "without `at` nothing is packed"
        return self.at.nonzero()

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        raise UsageError(
            f"capture of {name}",
            expected="a tap that was asked for and fired",
            found="no forward pass with meta-tokens" if name in self.names else "one that was not asked for",
            remedy="run the lens within the context" if name in self.names else "add it to the names",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def store(self, name: str, value: Tensor, columns: Tensor, finish: Callable[[Tensor], Tensor] | None) -> None:
        """Keep a copy of the selected tokens; `finish` is applied to these alone."""
        if name in self._values:
            raise UsageError(
                "capture", expected="one forward pass", found="a second", remedy="open a new capture for each"
            )
        if self.at is not None:
            inside = (columns >= 0) & (columns < self.at.shape[1])
            at = self.at.to(columns.device).expand(columns.shape[0], -1)
            value = value[inside & at.gather(1, columns.clamp(0, at.shape[1] - 1))]
        value = value.detach()
        value = value.clone() if finish is None else finish(value)
        self._values[name] = value.to(device=self.device, dtype=self.dtype or value.dtype)
        if ".meta_attn." in name:
            self.meta_columns = columns


class Lens:
    """Reads and changes the activations of a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at a model of this package, GPT-2 or GPT-Neo, in evaluation mode.

        Raises:
            UsageError: A model in training mode or of another class.
        """
        self.model = model
        self._check_mode()
        self.layout = describe_layout(model)
        self._edits: list[Edit] = []
        self._cuts: list[EdgeCut] = []
        self._captures: list[Captured] = []
        self._observers: list[Callable[[AttentionCall], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._pass = _Pass()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tap, in the order of firing."""
        names = ["embed.hook_embed"]
        for layer, site in enumerate(self.layout.blocks):
            names.append(f"blocks.{layer}.hook_resid_pre")
            for attention in site.attentions:
                names += [f"{attention.prefix}.{tap}" for tap in _BRANCH_TAPS]
                names.append(f"blocks.{layer}.{_out_tap(attention)}")
            names += [f"blocks.{layer}.{tap}" for tap in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
        return (*names, "ln_final.hook_normalized", "unembed.hook_logits")

    def __call__(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """Run the model without gradients; the arguments are its own."""
        self._check_mode()
        with torch.no_grad():
            return self.model(input_ids, **inputs)

    @contextmanager
    def capture(
        self,
        names: Sequence[str],
        *,
        at: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Iterator[Captured]:
        """Keep the activations of one forward pass within the context, as they are after all edits.

        Args:
            names: of taps, or patterns as `blocks.*.hook_resid_post`.
            at: (B or 1, T) bool, True at the tokens to keep, in columns of the whole sequence; None keeps all.
            dtype: to convert to; None keeps it.
            device: to copy to; None keeps it.

        Raises:
            UsageError: A name that no tap has.
        """
        captured = Captured(frozenset(name for pattern in names for name in self._match(pattern)), at, dtype, device)
        with self._active(self._captures, [captured]):
            yield captured

    @contextmanager
    def edit(self, *edits: Edit | EdgeCut) -> Iterator[None]:
        """Change every forward pass of the model within the context, in the order given; contexts nest.

        Raises:
            UsageError: A name that no tap has, a tap that can only be read, or edges of layers without the branch.
        """
        changes = [edit for edit in edits if isinstance(edit, Edit)]
        cuts = [edit for edit in edits if isinstance(edit, EdgeCut)]
        for change in changes:
            if any(name.endswith("hook_result") for name in self._match(change.name)):
                raise UsageError(
                    f"edit of {change.name}",
                    expected="a tap that can be changed",
                    found="hook_result, which is only read",
                    remedy="change hook_z of the same attention",
                )
        for cut in cuts:
            self._check_layers(cut)
        with self._active(self._edits, changes), self._active(self._cuts, cuts):
            yield

    @contextmanager
    def observe(self, observer: Callable[[AttentionCall], None]) -> Iterator[None]:
        """Hand each attention's queries, keys and mask to a function as it runs, so that no layer must be stored."""
        with self._active(self._observers, [observer]):
            yield

    # what follows hangs the hooks up and takes them down -----------------------------------------------------------

    def _check_mode(self) -> None:
        if self.model.training:
            raise UsageError(
                "model", expected="evaluation mode", found="training mode", remedy="call model.eval() before"
            )

    def _match(self, pattern: str) -> list[str]:
        names = self.names
        matched = fnmatch.filter(names, pattern)
        if not matched:
            nearest = difflib.get_close_matches(pattern, names, n=1)
            raise UsageError(
                "tap",
                expected="a name in Lens.names or a pattern of some",
                found=repr(pattern),
                remedy=f"did you mean {nearest[0]!r}?" if nearest else "print(lens.names) shows them",
            )
        return matched

    def _check_layers(self, cut: EdgeCut) -> None:
        with_branch = {
            site.layer for block in self.layout.blocks for site in block.attentions if site.branch == cut.branch
        }
        missing = sorted((cut.layers or set()) - with_branch)
        if missing or not with_branch:
            raise UsageError(
                f"layers of cut {cut.branch} edges",
                expected=f"some of {sorted(with_branch)}",
                found=str(missing or "a model without that attention"),
                remedy="name layers that have it",
            )

    @contextmanager
    def _active(self, active: list[Any], new: Sequence[Any]) -> Iterator[None]:
        before = list(active)
        active.extend(new)
        self._install()
        try:
            yield
        finally:
            active[:] = before
            self._install()

    def _install(self) -> None:
        while self._undo:
            self._undo.pop()()
        wanted = {name for captured in self._captures for name in captured.names}
        wanted.update(name for edit in self._edits for name in self._match(edit.name))
        if not (wanted or self._cuts or self._observers):
            return
        self._hook(self.model, before=self._begin)
        for layer, site in enumerate(self.layout.blocks):
            self._install_block(layer, site, wanted)
        for name, module in (
            ("ln_final.hook_normalized", self.layout.final_norm),
            ("unembed.hook_logits", self.layout.head),
        ):
            if name in wanted:
                self._hook(module, after=lambda _, __, output, name=name: self._fire(name, output))

    def _install_block(self, layer: int, site: BlockSite, wanted: set[str]) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            self._pass.hidden_shape = hidden.shape
            changed = self._fire("embed.hook_embed", hidden) if layer == 0 else hidden
            changed = self._fire(f"blocks.{layer}.hook_resid_pre", changed)
            return None if changed is hidden else ((changed, *args[1:]), kwargs)

        def middle(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._fire(f"blocks.{layer}.hook_resid_mid", args[0])
            if changed is args[0]:
                return None
            # the block adds its feed-forward part to what it had before, so the change is added behind it
            self._pass.added_in_middle = changed - args[0]
            return (changed, *args[1:]), kwargs

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden
            if self._pass.added_in_middle is not None:
                changed, self._pass.added_in_middle = changed + self._pass.added_in_middle, None
            changed = self._fire(f"blocks.{layer}.hook_resid_post", changed)
            if changed is hidden:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        self._hook(site.block, before=enter, after=leave)
        self._hook(site.mlp_norm, before=middle)
        if f"blocks.{layer}.hook_mlp_out" in wanted:
            self._hook(site.mlp, after=lambda _, __, out: self._fire(f"blocks.{layer}.hook_mlp_out", out))
        for attention in site.attentions:
            self._install_attention(attention, wanted)

    def _install_attention(self, site: AttentionSite, wanted: set[str]) -> None:
        cuts = [
            cut for cut in self._cuts if cut.branch == site.branch and (cut.layers is None or site.layer in cut.layers)
        ]
        taps = {name.removeprefix(f"{site.prefix}.") for name in wanted if name.startswith(f"{site.prefix}.")}
        out_name = f"blocks.{site.layer}.{_out_tap(site)}"
        if not (cuts or taps or self._observers or out_name in wanted):
            return

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._pass.enter_attention(site, args, kwargs, cuts, additive=self._is_mask_additive())

        def leave(_: nn.Module, __: Any, output: tuple[Any, ...]) -> Any:
            if site.branch == "attn":
                changed = self._fire(out_name, output[0])
                return None if changed is output[0] else (changed, *output[1:])
            pack = self._pass.pack
            full = pack.add(output[0].new_zeros(self._pass.hidden_shape), output[0])
            changed = self._fire(out_name, full)
            return None if changed is full else (pack.gather(changed), *output[1:])

        self._hook(site.module, before=enter, after=leave if out_name in wanted else None)
        if taps & {"hook_z", "hook_result"}:
            self._hook(site.output, before=lambda _, args, kwargs: self._fire_heads(site, args, kwargs))
        needs_scores = bool(self._observers) or bool(taps & {"hook_rot_q", "hook_rot_k"})
        if taps & set(_QKV) or (needs_scores and not site.rotates):
            self._install_projections(site)
        if site.rotates and needs_scores:
            self._replace_project(site)

    def _install_projections(self, site: AttentionSite) -> None:
        """Tap queries, keys and values where they are made; without rotation these are what the scores use."""
        taps = _QKV if len(site.projections) > 1 else (_QKV,)
        for module, tap in zip(site.projections, taps, strict=True):

            def made(_: nn.Module, __: Any, output: Tensor, tap: Any = tap) -> Tensor | None:
                names = (tap,) if isinstance(tap, str) else tap
                parts = output.chunk(len(names), dim=-1)
                changed = [self._fire_projection(site, name, part) for name, part in zip(names, parts, strict=True)]
                if all(new is old for new, old in zip(changed, parts, strict=True)):
                    return None
                return torch.cat(changed, dim=-1)

            self._hook(module, after=made)

    def _fire_projection(self, site: AttentionSite, tap: str, flat: Tensor) -> Tensor:
        heads = flat.unflatten(-1, (site.num_heads, site.head_dim))
        changed = self._fire(f"{site.prefix}.{tap}", heads, site=site)
        if not site.rotates and tap != "hook_v":
            changed = self._fire(f"{site.prefix}.{tap.replace('hook_', 'hook_rot_')}", changed, site=site)
            self._pass.scored[tap] = changed
            if tap == "hook_k":
                self._observe(site, self._pass.scored["hook_q"].transpose(1, 2), changed.transpose(1, 2))
        return flat if changed is heads else changed.flatten(-2)

    def _replace_project(self, site: AttentionSite) -> None:
        module: Any = site.module
        project = module.project

        def tapped(hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = project(hidden, rotary)
            query = self._fire_rotated(site, "hook_rot_q", query)
            key = self._fire_rotated(site, "hook_rot_k", key)
            self._observe(site, query, key)
            return query, key, value

        module.project = tapped  # an attribute of this instance, which hides the method
        self._undo.append(lambda: delattr(module, "project"))

    def _fire_rotated(self, site: AttentionSite, tap: str, heads_BHTD: Tensor) -> Tensor:
        heads = heads_BHTD.transpose(1, 2)
        changed = self._fire(f"{site.prefix}.{tap}", heads, site=site)
        return heads_BHTD if changed is heads else changed.transpose(1, 2)

    def _fire_heads(self, site: AttentionSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        heads = args[0].unflatten(-1, (site.num_heads, site.head_dim))
        changed = self._fire(f"{site.prefix}.hook_z", heads, site=site)
        weight: Tensor = site.output.weight  # type: ignore[assignment]
        weight = (weight if site.is_output_transposed else weight.T).unflatten(0, (site.num_heads, site.head_dim))
        self._fire(
            f"{site.prefix}.hook_result",
            changed,
            site=site,
            finish=lambda z: torch.einsum("...hd,hdc->...hc", z, weight),
        )
        return None if changed is heads else ((changed.flatten(-2), *args[1:]), kwargs)

    def _fire(
        self,
        name: str,
        value: Tensor,
        *,
        site: AttentionSite | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        columns = self._pass.columns(site, value)
        if finish is None:
            for edit in self._edits:
                if fnmatch.fnmatchcase(name, edit.name):
                    value = edit.change(value, columns)
        for captured in self._captures:
            if name in captured.names:
                captured.store(name, value, columns, finish)
        return value

    def _observe(self, site: AttentionSite, query: Tensor, key: Tensor) -> None:
        if not self._observers:
            return
        if self._pass.num_seen:
            raise UsageError(
                "observed forward pass",
                expected="no cached tokens",
                found=str(self._pass.num_seen),
                remedy="run it whole",
            )
        columns = self._pass.columns(site, query.transpose(1, 2))
        key = key[..., : query.shape[-1]]  # the surplus is for later queries, see `Rotary.apply`
        mask = _narrow(self._pass.mask, site.window, query)
        call = AttentionCall(site.layer, site.branch, query, key, mask, site.scaling, columns)
        for observer in self._observers:
            observer(call)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        past = inputs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        if not isinstance(seen, int):
            raise UsageError(
                "past_key_values", expected="a growing cache", found=type(past).__name__, remedy="use a DynamicCache"
            )
        self._pass = _Pass(num_seen=seen)

    def _is_mask_additive(self) -> bool:
        implementation = self.model.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise UsageError(
                "attention implementation of a model with cut edges",
                expected="eager or sdpa, whose masks are tensors",
                found=implementation,
                remedy='call model.set_attn_implementation("sdpa")',
            )
        return bool(implementation == "eager")

    def _hook(self, module: nn.Module, *, before: Any = None, after: Any = None) -> None:
        if before is not None:
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if after is not None:
            self._undo.append(module.register_forward_hook(after).remove)


@dataclasses.dataclass
class _Pass:
    """The forward pass that is under way."""

    num_seen: int = 0
    """Tokens in the cache before it."""
    hidden_shape: Any = None
    added_in_middle: Tensor | None = None
    pack: Any = None
    mask: Any = None
    scored: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def columns(self, site: AttentionSite | None, value: Tensor) -> Tensor:
        """Return the columns (B, T) of an activation's tokens."""
        if site is not None and site.branch == "meta_attn":
            columns: Tensor = self.pack.columns
            return columns
        count = torch.arange(value.shape[1], device=value.device) + self.num_seen
        return count.expand(value.shape[:2])

    def enter_attention(
        self,
        site: AttentionSite,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cuts: Sequence[EdgeCut],
        *,
        additive: bool,
    ) -> Any:
        """Note the mask of an attention, and return its arguments with the edges cut."""
        place, name = site.mask_argument
        given: Any = args[place] if len(args) > place else kwargs.get(name)
        cache_place, cache_name = site.cache_argument
        cache = args[cache_place] if len(args) > cache_place else kwargs.get(cache_name)
        if site.branch == "meta_attn":
            self.pack = given
            query_columns = given.columns
            layer = None if cache is None else cache.layers[site.layer]
            cached = None if layer is None else getattr(layer, "meta_columns", None)
            key_columns = query_columns if cached is None else torch.cat([cached, query_columns], dim=1)
            self.mask = _cut(given.mask, cuts, query_columns, key_columns, additive=additive)
            new = dataclasses.replace(given, mask=self.mask) if cuts else given
        else:
            query_columns = self.columns(None, args[0] if args else kwargs["hidden_states"])
            total = self.num_seen + query_columns.shape[1]
            key_columns = torch.arange(total, device=query_columns.device).expand(query_columns.shape[0], -1)
            self.mask = new = _cut(given, cuts, query_columns, key_columns, additive=additive)
        if not cuts:
            return None
        if len(args) > place:
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: new}


def _cut(mask: Any, cuts: Sequence[EdgeCut], query_columns: Tensor, key_columns: Tensor, *, additive: bool) -> Any:
    if not cuts:
        return mask
    queries, keys = query_columns[:, :, None], key_columns[:, None, :]
    keep = torch.ones_like(queries == keys)
    for cut in cuts:
        keep &= ~cut.pattern(query_columns, key_columns)
    keep = (keep | (queries == keys))[:, None]  # the own edge keeps every row from being empty
    if mask is None:
        mask = ((keys <= queries) & (keys >= 0))[:, None]  # a key of no column is padding
    if mask.dtype == torch.bool:
        kept = mask & keep
        return torch.where(kept, 0.0, torch.finfo(torch.float32).min) if additive else kept
    return torch.where(keep, mask, torch.finfo(mask.dtype).min)


def _narrow(mask: Any, window: int | None, query: Tensor) -> Any:
    """Return a mask without the keys behind a window."""
    num_tokens = query.shape[-2]
    if window is None or num_tokens <= window:
        return mask
    near = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    if mask is None:
        return near[None, None]
    return mask & near if mask.dtype == torch.bool else torch.where(near, mask, torch.finfo(mask.dtype).min)


def _out_tap(site: AttentionSite) -> str:
    return "hook_attn_out" if site.branch == "attn" else "hook_meta_out"
