"""The lens: read and change what a model computes, by name and by position, without touching its weights.

    lens = Lens(model.eval())
    meta = model.config.meta_token_id
    input_ids = torch.tensor([[5, 9, meta, 7, 12]])
    is_meta, is_answer = input_ids == meta, input_ids == 12
    with lens.capture(["blocks.*.hook_resid_post"], at=is_meta) as captured:
        lens(input_ids)
    captured["blocks.3.hook_resid_post"]                        # (number of meta-tokens, C)
    with lens.edit(edits.cut_edges(None, query=is_answer, key=is_meta)):
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
prefix `blocks.l.`. Each fires once a forward pass; those of meta-attention only where there are meta-tokens. GPT-Neo
projects one after the other, so its rotated queries fire before its keys.

Hooks are hung on the modules that requested taps need, and gone with the context. With nothing changed the logits keep
their bits. No attention backend is asked for its weights. Not under `torch.compile`, nor with a static cache.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metatokens.errors import UsageError
from metatokens.lens.activations import AttentionCall, Captured
from metatokens.lens.edits import EdgeCut, Edit
from metatokens.lens.hooks import Hooks, Requests, match_names
from metatokens.lens.layout import describe_layout

__all__ = ["AttentionCall", "Captured", "Lens"]


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
        self._requests: list[Requests] = []
        self._hooks = Hooks(model, self.layout, self._requests)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tap, in the order of firing."""
        return self.layout.tap_names

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
            UsageError: A name that no tap has, or an `at` that is no such mask.
        """
        if at is not None and (at.dtype != torch.bool or at.ndim != 2):
            raise UsageError(
                "at",
                expected="a mask (B or 1, T) of bool",
                found=f"{tuple(at.shape)} of {str(at.dtype).removeprefix('torch.')}",
                remedy="write it as input_ids == id, or mask[None]",
            )
        captured = Captured(frozenset(name for pattern in names for name in self._match(pattern)), at, dtype, device)
        with self._active(Requests(captures=[captured])):
            yield captured

    @contextmanager
    def edit(self, *edits: Edit | EdgeCut) -> Iterator[None]:
        """Change every forward pass within the context, in the order given; contexts nest, and end in any order.

        Raises:
            UsageError: A name that no tap has, a tap that can only be read, or edges that the model does not have.
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
            self._check_edges(cut)
        with self._active(Requests(edits=changes, cuts=cuts)):
            yield

    @contextmanager
    def observe(self, observer: Callable[[AttentionCall], None]) -> Iterator[None]:
        """Hand each attention's queries, keys and mask to a function as it runs, so that no layer must be stored."""
        with self._active(Requests(observers=[observer])):
            yield

    @contextmanager
    def _active(self, requests: Requests) -> Iterator[None]:
        self._requests.append(requests)
        try:
            self._hang()
            yield
        finally:
            self._requests.remove(requests)  # this context's own: contexts may end in any order
            self._hang()

    def _hang(self) -> None:
        self._hooks.close()
        self._hooks = Hooks(self.model, self.layout, self._requests)

    def _check_mode(self) -> None:
        # a part in training mode would drop activations
        if any(module.training for module in self.model.modules()):
            raise UsageError(
                "model", expected="evaluation mode", found="training mode", remedy="call model.eval() before"
            )

    def _match(self, pattern: str) -> list[str]:
        names = self.names
        matched = match_names(names, pattern)
        if not matched:
            nearest = difflib.get_close_matches(pattern, names, n=1)
            raise UsageError(
                "tap",
                expected="a name in Lens.names or a pattern of some",
                found=repr(pattern),
                remedy=f"did you mean {nearest[0]!r}?" if nearest else "print(lens.names) shows them",
            )
        return matched

    def _check_edges(self, cut: EdgeCut) -> None:
        sites = [site for block in self.layout.blocks for site in block.attentions if site.branch == cut.branch]
        layers = {site.layer for site in sites}
        missing = sorted((cut.layers or set()) - layers)
        if missing or not layers:
            raise UsageError(
                f"layers of cut {cut.branch} edges",
                expected=f"some of {sorted(layers)}",
                found=str(missing or "a model without that attention"),
                remedy="name layers that have it",
            )
        missing = sorted((cut.heads or set()) - set(range(sites[0].num_heads)))
        if missing:
            raise UsageError(
                f"heads of cut {cut.branch} edges",
                expected=f"some of 0..{sites[0].num_heads - 1}",
                found=str(missing),
                remedy="name heads of the model",
            )
