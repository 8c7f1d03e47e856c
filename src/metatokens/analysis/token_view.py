"""One short text token by token: what a page needs to show who attends to whom, and what each token costs.

All of it is measured here, so that a report computes nothing. Arrays, for T tokens of which M are in meta-attention:

    attention              (L, H, T, T)   uint8    round(255 sqrt(weight)); row = query; 0 above the diagonal
    meta_attention         (L, H, M, M)   uint8    the same for meta-attention; 0 in a layer without it
    meta_attention_tokens  (M,)           int16    which of the T tokens its rows and columns are
    received_attention     (L, H, T)      float32  mean weight that a key gets from the queries that see it, itself too
    loss_with              (T,)           float32  -ln p of the token, nats; NaN at meta-tokens and unpredicted ones
    loss_without           (T,)           float32  the same for the text without its meta-tokens, at the same places
    cosine_raw             (L, T, T)      int8     round(127 cosine) of states after each block; 0 above the diagonal
    cosine_centred         (L, T, T)      int8     the same, after subtracting the mean of a calibration text

A weight is (value / 255)^2 and a cosine value / 127, either wrong by at most 0.004. A text without meta-tokens has no
arrays of meta-attention, and its `loss_without` equals `loss_with`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.attention_statistics import check_plain_softmax, mask_of
from metatokens.analysis.lens import AttentionCall, Lens
from metatokens.analysis.results import TokenView
from metatokens.analysis.similarity import Calibration, standardize
from metatokens.analysis.states import find_meta_tokens, residual_names
from metatokens.errors import UsageError

LONGEST_VIEW = 256  # tokens; the attention of 12 layers of 12 heads is then 9.4 MB before compression
_ATTENTION_STEPS, _COSINE_STEPS = 255, 127


@dataclass(frozen=True)
class MeasuredView:
    """A text, its tokens as text, and the arrays of the module's table."""

    tokens: tuple[str, ...]
    is_meta: tuple[bool, ...]
    arrays: dict[str, npt.NDArray[Any]]

    def named(self, title: str, key: str) -> tuple[TokenView, dict[str, npt.NDArray[Any]]]:
        """Return the view as results declare it, and its arrays under keys of their own, `KEY.NAME`."""
        keys = {name: f"{key}.{name}" for name in self.arrays}
        view = TokenView(title=title, tokens=self.tokens, is_meta=self.is_meta, arrays=keys)
        return view, {keys[name]: array for name, array in self.arrays.items()}


def measure_token_view(
    lens: Lens,
    input_ids: Tensor,
    decode: Callable[[list[int]], str],
    *,
    calibrations: Sequence[Calibration] | None = None,
) -> MeasuredView:
    """Measure one text in two forward passes, with its meta-tokens and without.

    Args:
        lens: on the model.
        input_ids: (T,) with meta-tokens, without padding, at most 256.
        decode: makes text of a list of ids, such as a tokenizer's own.
        calibrations: of the L + 1 layers, see `similarity.calibrate`; without them there is no `cosine_centred`.

    Raises:
        UsageError: more than 256 tokens, no text, or a model whose attention is no softmax of its scores.
    """
    is_meta = find_meta_tokens(lens, input_ids)
    if input_ids.ndim != 1 or not 0 < len(input_ids) <= LONGEST_VIEW or bool(is_meta.all()):
        raise UsageError(
            "token view",
            expected=f"the ids of one text, at most {LONGEST_VIEW}",
            found=f"an array {tuple(input_ids.shape)} with {int((~is_meta).sum())} text tokens",
            remedy="cut a window out of the text",
        )
    check_plain_softmax(lens)
    attention = _AttentionArrays(lens, len(input_ids))
    names = residual_names(lens)
    with lens.observe(attention.add), lens.capture(names, dtype=torch.float32) as captured:
        logits = lens(input_ids[None], use_cache=False).logits[0]
    policy = getattr(lens.model.config, "loss_policy", "skip")
    arrays = attention.arrays | {
        "loss_with": token_losses(logits, input_ids, is_meta, policy),
        "loss_without": np.full(len(input_ids), np.nan, dtype=np.float32),
        "cosine_raw": np.stack([quantize_cosines(captured[name][0]) for name in names[1:]]),
    }
    text_ids = input_ids[~is_meta]
    text_logits = lens(text_ids[None], use_cache=False).logits[0]
    no_meta = torch.zeros_like(text_ids, dtype=torch.bool)
    arrays["loss_without"][(~is_meta).numpy(force=True)] = token_losses(text_logits, text_ids, no_meta, policy)
    if calibrations is not None:
        centred = [
            standardize(captured[name], is_meta[None], calibration, "centred")[0]
            for name, calibration in zip(names[1:], calibrations[1:], strict=True)
        ]
        arrays["cosine_centred"] = np.stack([quantize_cosines(states) for states in centred])
    tokens = tuple(decode([token_id]) for token_id in input_ids.tolist())
    return MeasuredView(tokens, tuple(is_meta.tolist()), arrays)


def attention_weights(query_HTD: Tensor, key_HTD: Tensor, *, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return causal attention weights (H, T, T), float32, row = query; a row that sees no key is 0.

    Args:
        query_HTD: (H, T, D) as the scores use them.
        key_HTD: (H, T, D).
        scaling: what products are multiplied by.
        mask: None, or (1 or H, T, T), bool (True = keep) or additive.
    """
    scores = query_HTD.float() @ key_HTD.float().transpose(-1, -2) * scaling
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().expand_as(scores)
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        scores, keep = scores + mask, keep & (mask > torch.finfo(mask.dtype).min / 2)
    return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0)


def quantize_weights(weights: Tensor) -> npt.NDArray[np.uint8]:
    """Return round(255 sqrt(weight)); the root keeps small weights apart."""
    steps: npt.NDArray[np.uint8] = (weights.sqrt() * _ATTENTION_STEPS).round().to(torch.uint8).numpy(force=True)
    return steps


def quantize_cosines(states_TC: Tensor) -> npt.NDArray[np.int8]:
    """Return round(127 cosine) of each token with itself and those before it, (T, T), 0 above the diagonal."""
    directions = torch.nn.functional.normalize(states_TC, dim=-1)
    cosines = (directions @ directions.T).clamp(-1, 1).tril()
    steps: npt.NDArray[np.int8] = (cosines * _COSINE_STEPS).round().to(torch.int8).numpy(force=True)
    return steps


def token_losses(logits_TV: Tensor, input_ids: Tensor, is_meta: Tensor, loss_policy: str) -> npt.NDArray[np.float32]:
    """Return -ln p of each token, at the token itself and not where it is predicted.

    Under "skip" the token before predicts, whatever it is; under "retarget" the last text token before.

    Args:
        logits_TV: (T, V).
        input_ids: (T,) int64.
        is_meta: (T,) bool.
        loss_policy: of the model.

    Returns:
        (T,) float32 in nats, NaN at meta-tokens and at a token that nothing predicts.
    """
    positions = torch.arange(len(input_ids), device=input_ids.device)
    before = positions - 1
    if loss_policy == "retarget":
        last_text = torch.where(is_meta, -1, positions).cummax(0).values
        before = torch.nn.functional.pad(last_text[:-1], (1, 0), value=-1)
    log_p = logits_TV.float().log_softmax(-1)[before.clamp(min=0), input_ids]
    losses: npt.NDArray[np.float32] = torch.where(is_meta | (before < 0), torch.nan, -log_p).numpy(force=True)
    return losses


class _AttentionArrays:
    """Quantised attention of one text, filled layer by layer as the model runs."""

    def __init__(self, lens: Lens, num_tokens: int) -> None:
        sites = [site for block in lens.layout.blocks for site in block.attentions]
        self.num_layers, self.num_heads = len(lens.layout.blocks), sites[0].num_heads
        shape = (self.num_layers, self.num_heads, num_tokens)
        self.arrays: dict[str, npt.NDArray[Any]] = {
            "attention": np.zeros((*shape, num_tokens), dtype=np.uint8),
            "received_attention": np.zeros(shape, dtype=np.float32),
        }

    def add(self, call: AttentionCall) -> None:
        """Take one attention, whose batch is this one text."""
        mask = mask_of(call)
        weights = attention_weights(
            call.query_BHTD[0], call.key_BHTD[0], scaling=call.scaling, mask=None if mask is None else mask[0]
        )
        if call.branch == "attn":
            self.arrays["attention"][call.layer] = quantize_weights(weights)
            num_queries = torch.arange(weights.shape[-1], 0, -1, device=weights.device)
            self.arrays["received_attention"][call.layer] = (weights.sum(-2) / num_queries).numpy(force=True)
            return
        columns = call.columns[0].numpy(force=True).astype(np.int16)
        if "meta_attention" not in self.arrays:
            shape = (self.num_layers, self.num_heads, len(columns), len(columns))
            self.arrays["meta_attention"] = np.zeros(shape, dtype=np.uint8)
            self.arrays["meta_attention_tokens"] = columns
        self.arrays["meta_attention"][call.layer] = quantize_weights(weights)
