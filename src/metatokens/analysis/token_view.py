"""One text token by token: what a page needs to show who attends to whom, and what each token costs.

All of it is measured here, so that a report computes nothing. Arrays, for T tokens, M of them in meta-attention:

    attention              (L, H, T, T)   uint8    round(255 sqrt(weight)); row = query; 0 above the diagonal
    meta_attention         (L, H, M, M)   uint8    the same for meta-attention; 0 in a layer without it
    meta_attention_tokens  (M,)           int16    which of the T tokens its rows and columns are
    received_attention     (L, H, T)      float32  mean weight that a key gets from the queries that see it, itself too
    loss_with              (T,)           float32  -ln p of the token, nats; NaN at meta-tokens and unpredicted ones
    loss_without           (T,)           float32  the same for the text without its meta-tokens, at the same places
    logit                  (T,)           float32  of the token over the mean logit of the vocabulary; NaN as in losses
    logit_attention        (L, T)         float32  what each layer's attention adds to it
    logit_meta_attention   (L, T)         float32  what its meta-attention adds; 0 in a layer without it
    logit_mlp              (L, T)         float32  what its feed-forward part adds
    patch_effect           (L + 1, T)     float32  of one prompt of a minimal pair, see `causal.patching.patch_map`
    cosine_raw             (L, T, T)      int8     round(127 cosine) of states after each block; 0 above the diagonal
    cosine_centred         (L, T, T)      int8     the same, after subtracting the mean of a calibration text

A weight is (value / 255)^2 and a cosine value / 127, either wrong by at most 0.004. Losses and logits stand at the
token itself and not where it is predicted. A text without meta-tokens has no arrays of meta-attention, and its
`loss_without` equals `loss_with`.

A text of more than 256 tokens has no cosines, no meta-attention if more than 256 tokens are in it, and in place of
`attention` the K = 32 largest weights of a row. They are of the mean over heads and of h = min(12, H) heads of each
layer: those whose mean log-odds of the mass on meta keys, over the queries from the first meta-token on, are
farthest from 0.

    attention_heads        (L, h)             int16    which heads, rising
    attention_keys         (L, 1 + h, T, K)   uint16   the keys of a row's largest weights; plane 0 is the mean of all H
    attention_weights      (L, 1 + h, T, K)   uint8    round(255 sqrt(weight)) of these; 0 where a row has fewer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import attention_weights, check_plain_softmax, row_statistics
from metatokens.analysis.causal.patching import patch_map
from metatokens.analysis.inputs.pairs import MinimalPair, pairs_of
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.representations.attribution import attribute_tokens
from metatokens.analysis.representations.logits import predicting_positions
from metatokens.analysis.representations.similarity import Calibration, calibrations_of, standardize
from metatokens.analysis.results import TokenView
from metatokens.config.analysis import LONGEST_VIEW, TaskSubject
from metatokens.errors import UsageError
from metatokens.lens.lens import AttentionCall, Captured, Lens
from metatokens.lens.residuals import residual_names

DENSE_VIEW = 256
"""Tokens up to which every weight is kept; the attention of 12 layers of 12 heads is then 9.4 MB before compression."""
SPARSE_HEADS = 12
SPARSE_KEYS = 32
_ATTENTION_STEPS, _COSINE_STEPS = 255, 127
_ROWS_AT_A_TIME = 256  # of logits: 51 MB of float32 at GPT-2's vocabulary


def measure_token_view(
    lens: Lens,
    input_ids: Tensor,
    *,
    calibrations: Sequence[Calibration] | None = None,
    patch_effect: npt.NDArray[Any] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Measure one text in three forward passes: with its meta-tokens, once more to share out its logits, and without.

    Args:
        lens: On the model.
        input_ids: (T,) with meta-tokens, without padding, at most 2,048.
        calibrations: Of the L + 1 layers, see `similarity.calibrate`; without them there is no `cosine_centred`.
        patch_effect: (L + 1, T), where the text is a prompt of a minimal pair.

    Returns:
        The arrays of the module's table.

    Raises:
        UsageError: More than 2,048 tokens, no text, or a model whose attention is no softmax of its scores.
        ValueError: An effect of another shape.
    """
    is_meta = lens.is_meta(input_ids)
    if input_ids.ndim != 1 or not 0 < len(input_ids) <= LONGEST_VIEW or bool(is_meta.all()):
        raise UsageError(
            "token view",
            expected=f"the ids of one text, at most {LONGEST_VIEW}",
            found=f"an array {tuple(input_ids.shape)} with {int((~is_meta).sum())} text tokens",
            remedy="cut a window out of the text",
        )
    check_plain_softmax(lens)
    is_dense = len(input_ids) <= DENSE_VIEW
    attention = (_DenseAttention if is_dense else _SparseAttention)(lens, is_meta)
    names = residual_names(lens) if is_dense else []
    with lens.observe(attention.add), lens.capture(names, dtype=torch.float32) as captured:
        logits = lens(input_ids[None], use_cache=False).logits[0]
    arrays = attention.arrays | {"loss_with": token_losses(logits, input_ids, is_meta, lens.loss_policy)}
    del logits  # 0.4 GB of 2,048 tokens at GPT-2's vocabulary
    without = np.full(len(input_ids), np.nan, dtype=np.float32)
    text_ids = input_ids[~is_meta]
    text_logits = lens(text_ids[None], use_cache=False).logits[0]
    no_meta = torch.zeros_like(text_ids, dtype=torch.bool)
    without[(~is_meta).numpy(force=True)] = token_losses(text_logits, text_ids, no_meta, lens.loss_policy)
    arrays |= {"loss_without": without, **_logits_by_layer(attribute_tokens(lens, input_ids), len(lens.layout.blocks))}
    if is_dense:
        arrays |= _cosines(captured, names, calibrations)
    if patch_effect is not None:
        shape = len(lens.layout.blocks) + 1, len(input_ids)
        if patch_effect.shape != shape:
            raise ValueError(f"the patch effect of this text is an array {shape}, not {patch_effect.shape}")
        arrays["patch_effect"] = patch_effect.astype(np.float32)
    return arrays


def declare_view(
    lens: Lens,
    input_ids: Tensor,
    arrays: dict[str, npt.NDArray[Any]],
    decode: Callable[[list[int]], str],
    *,
    title: str,
    key: str,
) -> tuple[TokenView, dict[str, npt.NDArray[Any]]]:
    """Return the view of a text as results declare it, and its arrays under keys of their own, `KEY.NAME`."""
    view = TokenView(
        title=title,
        tokens=tuple(decode([token_id]) for token_id in input_ids.tolist()),
        is_meta=tuple(lens.is_meta(input_ids).tolist()),
        arrays={name: f"{key}.{name}" for name in arrays},
    )
    return view, {f"{key}.{name}": array for name, array in arrays.items()}


def _logits_by_layer(columns: dict[str, npt.NDArray[np.float32]], num_layers: int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of logits; those of the embedding and of the biases are left out."""
    arrays = {"logit": columns["logit"]}
    absent = np.where(np.isnan(columns["logit"]), np.float32(np.nan), np.float32(0))
    for name, branch in (("attention", "attn_out"), ("meta_attention", "meta_out"), ("mlp", "mlp_out")):
        layers = [columns.get(f"blocks.{layer}.{branch}") for layer in range(num_layers)]
        if any(layer is not None for layer in layers):
            arrays[f"logit_{name}"] = np.stack([absent if layer is None else layer for layer in layers])
    return arrays


def _cosines(
    captured: Captured, names: Sequence[str], calibrations: Sequence[Calibration] | None
) -> dict[str, npt.NDArray[Any]]:
    arrays = {"cosine_raw": np.stack([quantize_cosines(captured[name][0]) for name in names[1:]])}
    if calibrations is not None:
        centred = [
            standardize(captured[name], calibration, "centred")[0]
            for name, calibration in zip(names[1:], calibrations[1:], strict=True)
        ]
        arrays["cosine_centred"] = np.stack([quantize_cosines(states) for states in centred])
    return arrays


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

    Args:
        logits_TV: (T, V).
        input_ids: (T,) int64.
        is_meta: (T,) bool.
        loss_policy: of the model; see `predicting_positions`.

    Returns:
        (T,) float32 in nats, NaN at meta-tokens and at a token that nothing predicts.
    """
    before = predicting_positions(is_meta, loss_policy)
    log_p = [
        logits_TV[rows.clamp(min=0)].float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for rows, ids in zip(before.split(_ROWS_AT_A_TIME), input_ids.split(_ROWS_AT_A_TIME), strict=True)
    ]
    losses: npt.NDArray[np.float32] = torch.where(before < 0, torch.nan, -torch.cat(log_p)).numpy(force=True)
    return losses


class _AttentionArrays(ABC):
    """Quantised attention of one text, filled layer by layer as the model runs."""

    def __init__(self, lens: Lens, is_meta: Tensor) -> None:
        sites = [site for block in lens.layout.blocks for site in block.attentions]
        self.num_layers, self.num_heads = len(lens.layout.blocks), sites[0].num_heads
        self.is_meta, self.num_tokens = is_meta, len(is_meta)
        self.arrays: dict[str, npt.NDArray[Any]] = {
            "received_attention": np.zeros((self.num_layers, self.num_heads, self.num_tokens), dtype=np.float32)
        }
        num_queries = torch.arange(self.num_tokens, 0, -1, device=is_meta.device)
        self._num_queries = num_queries  # that see each key

    def add(self, call: AttentionCall) -> None:
        """Take one attention, whose batch is this one text."""
        if call.branch == "attn":
            self._add_attention(call)
            return
        columns = call.columns[0].numpy(force=True).astype(np.int16)
        if len(columns) > DENSE_VIEW:
            return
        if "meta_attention" not in self.arrays:
            shape = (self.num_layers, self.num_heads, len(columns), len(columns))
            self.arrays["meta_attention"] = np.zeros(shape, dtype=np.uint8)
            self.arrays["meta_attention_tokens"] = columns
        self.arrays["meta_attention"][call.layer] = quantize_weights(attention_weights(call))

    @abstractmethod
    def _add_attention(self, call: AttentionCall) -> None:
        """Take ordinary attention, dense or sparse."""

    def _add_received(self, layer: int, heads: slice, weights_HTT: Tensor) -> None:
        received = weights_HTT.sum(-2) / self._num_queries
        self.arrays["received_attention"][layer, heads] = received.numpy(force=True)


class _DenseAttention(_AttentionArrays):
    """Every weight."""

    def __init__(self, lens: Lens, is_meta: Tensor) -> None:
        super().__init__(lens, is_meta)
        shape = (self.num_layers, self.num_heads, self.num_tokens, self.num_tokens)
        self.arrays["attention"] = np.zeros(shape, dtype=np.uint8)

    def _add_attention(self, call: AttentionCall) -> None:
        weights = attention_weights(call)
        self.arrays["attention"][call.layer] = quantize_weights(weights)
        self._add_received(call.layer, slice(None), weights)


class _SparseAttention(_AttentionArrays):
    """The largest weights of each row, of some heads and of the mean; holds one head's matrix at a time."""

    def __init__(self, lens: Lens, is_meta: Tensor) -> None:
        super().__init__(lens, is_meta)
        num_shown = min(SPARSE_HEADS, self.num_heads)
        shape = (self.num_layers, 1 + num_shown, self.num_tokens, SPARSE_KEYS)
        self.arrays |= {
            "attention_heads": np.zeros((self.num_layers, num_shown), dtype=np.int16),
            "attention_keys": np.zeros(shape, dtype=np.uint16),
            "attention_weights": np.zeros(shape, dtype=np.uint8),
        }

    def _add_attention(self, call: AttentionCall) -> None:
        shown = self._choose_heads(call)
        self.arrays["attention_heads"][call.layer] = shown
        mean = torch.zeros(self.num_tokens, self.num_tokens, device=self.is_meta.device)
        for head in range(self.num_heads):
            weights = attention_weights(call, slice(head, head + 1))
            self._add_received(call.layer, slice(head, head + 1), weights)
            mean += weights[0] / self.num_heads
            if head in shown:
                self._add_plane(call.layer, 1 + shown.index(head), weights[0])
        self._add_plane(call.layer, 0, mean)

    def _add_plane(self, layer: int, plane: int, weights_TT: Tensor) -> None:
        largest, keys = weights_TT.topk(SPARSE_KEYS)
        self.arrays["attention_keys"][layer, plane] = keys.numpy(force=True)
        self.arrays["attention_weights"][layer, plane] = quantize_weights(largest)

    def _choose_heads(self, call: AttentionCall) -> list[int]:
        """Return the heads with the largest mean |meta log-odds|, rising; the first ones of a text without meta."""
        num_shown = min(SPARSE_HEADS, self.num_heads)
        if num_shown == self.num_heads or not self.is_meta.any():
            return list(range(num_shown))
        rows = torch.arange(int(self.is_meta.nonzero()[0]), self.num_tokens)
        log_odds = row_statistics(call, is_meta=self.is_meta[None], rows=rows).meta_log_odds[0]
        # a row that sees meta keys alone has no log-odds
        means = torch.nanmean(torch.where(log_odds.isfinite(), log_odds, torch.nan).double(), dim=-1)
        order = means.abs().nan_to_num(-1).argsort(descending=True, stable=True)
        return sorted(order[:num_shown].tolist())


# Which texts are shown --------------------------------------------------------------------------------------------


def views_of(inputs: Inputs) -> list[TokenView]:
    """Show some documents token by token, and of a task one prompt of a minimal pair with its patch effects."""
    lens, config, calibrations = inputs.lens, inputs.config, calibrations_of(inputs)
    views: list[TokenView] = []

    def keep(title: str, input_ids: Tensor, patch_effect: npt.NDArray[Any] | None = None) -> None:
        measured = measure_token_view(lens, input_ids, calibrations=calibrations, patch_effect=patch_effect)
        key, decode = f"view{len(views)}", inputs.tokenizer.decode
        view, arrays = declare_view(lens, input_ids, measured, decode, title=title, key=key)
        views.append(view)
        inputs.arrays.update(arrays)

    for document in inputs.subject.documents[: config.token_views]:
        keep(document.name, document.input_ids[0, : config.view_tokens])
    if not isinstance(config.subject, TaskSubject):
        return views
    found = _first_pair(inputs)
    if found is None:
        inputs.skip(
            f"patch effects: no minimal pair of at most {config.view_tokens} tokens with a meta-token behind the item"
        )
        return views
    number, pair = found
    clean = torch.from_numpy(pair.clean).to(lens.model.device)
    keep(f"minimal pair {number}: clean prompt", clean, patch_map(lens, pair))
    return views


def _first_pair(inputs: Inputs) -> tuple[int, MinimalPair] | None:
    """Return the first pair that is short enough for a view and has a meta-token behind its item, with its number."""
    try:
        pairs = pairs_of(inputs)
    except UsageError:  # the causal part says why
        return None
    short = ((number, pair) for number, pair in enumerate(pairs) if len(pair.clean) <= inputs.config.view_tokens)
    return next(short, None)
