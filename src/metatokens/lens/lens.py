"""The lens: read and change what a model computes, by name and by position, without touching its weights.

    lens = Lens(model.eval())
    input_ids = torch.tensor([[5, 9, lens.meta_token_id, 7, 12]])
    is_meta, is_answer = lens.is_meta(input_ids), input_ids == 12
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
    hook_attn_out                         (B, T, C)
    meta_attn.hook_q ... hook_z           (B, M, H, D)   of the packed meta-tokens
    hook_meta_out                         (B, T, C)      zero at every other token
    hook_resid_mid, hook_mlp_out, hook_resid_post        (B, T, C)

and `embed.hook_embed` (what enters the first block), `ln_final.hook_normalized`, `unembed.hook_logits`. Block l has the
prefix `blocks.l.`. Each fires once a forward pass; those of meta-attention fire only where there are meta-tokens.
GPT-Neo projects queries, keys and values one after the other, so its rotated queries fire before its keys.

Decoders that can be grafted (Llama, Qwen, Mistral, SmolLM, Gemma, GPT-NeoX) rotate inside of their attention, so they
have no rotated taps and cannot be observed; keys and values have the model's number of heads for them. GPT-NeoX has
neither a middle of the residual stream nor taps of its projections, which are one. A grafted model has its anchors as
columns between those of the text: `lens.is_meta` tells which, T is their number together, and only its logits are of
the text alone. Its meta-attention is a part of `hook_attn_out`.

Hooks hang only on the modules that the requested taps need, and go with the context. With nothing changed the logits
keep their bits. No attention backend is asked for its weights. A lens works neither under `torch.compile` nor with a
static cache.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metatokens.config.schema import LossPolicy
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.graft.grafting import graft_of
from metatokens.graft.spreading import spread
from metatokens.lens.activations import AttentionCall, Captured
from metatokens.lens.edits import EdgeCut, Edit
from metatokens.lens.hooks import Hooks, Requests, match_names
from metatokens.lens.layout import describe_layout
from metatokens.lens.positions import check_positions

__all__ = ["AttentionCall", "Captured", "Lens"]


class Lens:
    """Reads and changes the activations of a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at a model of this package, GPT-2, or a decoder that can be grafted or is, in evaluation mode.

        Raises:
            UsageError: A model of another class.
            ValueError: A model in training mode.
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

    @property
    def meta_token_id(self) -> int | None:
        """The id of the model's meta-token; None for a model without one."""
        meta_token_id: int | None = getattr(self.model.config, "meta_token_id", None)
        return meta_token_id

    @property
    def loss_policy(self) -> LossPolicy:
        """What predicts a token behind meta-tokens; a model that does not say predicts from the position before."""
        policy: LossPolicy = getattr(self.model.config, "loss_policy", "skip")
        return policy

    def is_meta(self, input_ids: Tensor) -> Tensor:
        """Tell which columns are the model's meta-tokens: (B, T) bool, of a grafted model (1, W) with its anchors."""
        if hasattr(self.model, GRAFT):
            return spread(graft_of(self.model).config, torch.ones_like(input_ids[:1], dtype=torch.bool)).is_anchor
        if self.meta_token_id is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.meta_token_id

    def __call__(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """Run the model without gradients; the arguments are its own."""
        self._check_mode()
        with torch.no_grad():
            return self.model(input_ids, **inputs)

    def run(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Run the model for its activations: without a cache, and with the logits of the last token alone."""
        return self(input_ids, **{"use_cache": False, "logits_to_keep": 1, **inputs})

    @contextmanager
    def capture(
        self, names: Sequence[str], *, at: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Captured]:
        """Keep the activations of one forward pass within the context, as they are after all edits.

        Args:
            names: Of taps, or patterns such as `blocks.*.hook_resid_post`.
            at: (B or 1, T) bool, True at the tokens to keep, in columns of the whole sequence; None keeps all.
            dtype: To convert to; None keeps it.

        Raises:
            ValueError: A name that no tap has, or an `at` that is no such mask.
        """
        check_positions(at)
        captured = Captured(frozenset(name for pattern in names for name in self._match(pattern)), at, dtype)
        with self._active(Requests(captures=[captured])):
            yield captured

    @contextmanager
    def edit(self, *edits: Edit | EdgeCut) -> Iterator[None]:
        """Change every forward pass within the context, in the order given; contexts nest, and end in any order.

        Raises:
            ValueError: A name that no tap has, or edges that the model does not have.
        """
        changes = [edit for edit in edits if isinstance(edit, Edit)]
        cuts = [edit for edit in edits if isinstance(edit, EdgeCut)]
        for change in changes:
            self._match(change.name)
        for cut in cuts:
            self._check_layers(cut)
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
        if any(module.training for module in self.model.modules()):
            raise ValueError(
                "the model is in training mode, where dropout changes activations; call model.eval() first"
            )

    def _match(self, pattern: str) -> list[str]:
        matched = match_names(self.names, pattern)
        if not matched:
            nearest = difflib.get_close_matches(pattern, self.names, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "lens.names lists all"
            raise ValueError(f"no tap is named {pattern!r}; {hint}")
        return matched

    def _check_layers(self, cut: EdgeCut) -> None:
        layers = self.layout.meta_layers if cut.branch == "meta_attn" else list(range(len(self.layout.blocks)))
        missing = sorted((cut.layers or set()) - set(layers))
        if missing or not layers:
            raise ValueError(f"{cut.branch} edges can be cut in the layers {layers}, not in {missing or 'all'}")
