"""The loss of each text token of a document in windows, for one model: a full window a row, batch by batch.

Losses are in nats. Probabilities are computed in float32 or better, over the whole vocabulary including meta-token and
padding, as in training. The model's loss policy decides which output predicts a text token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.config.schema import LossPolicy
from metatokens.data.byte_level import TokenIds
from metatokens.data.injection import (
    IGNORE_INDEX,
    BoolArray,
    IntArray,
    inject_meta_tokens,
    sample_meta_positions,
    warn_without_meta_tokens,
)
from metatokens.data.tokenizer import TextEncoder, ends_clause_table
from metatokens.errors import UsageError
from metatokens.evaluation.extrapolation import reads_beyond_its_window, texts_of
from metatokens.evaluation.interventions import check_interventions
from metatokens.evaluation.windows import PerplexityOptions, fit_injection, full_window, lay_windows, with_window
from metatokens.generation.decoding import check_tokenizer, sequence_limit
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from metatokens.model import MetaTokenForCausalLM

FloatArray = npt.NDArray[np.float64]
DEFAULT_STRIDE = 256  # YaRN, jquesnelle/yarn@master:eval/perplexity.py


class TokenScorer:
    """The loss of each text token of a document, for one model and protocol.

    Attributes:
        encoder: The bulk encoder of the text tokenizer.
        loss_policy: The model's.
        text_tokens_per_window: N of a full window.
        positions_per_window: N + M of a full window.
        options: The protocol, with its window.
        stride: S, in text tokens.

    Raises:
        UsageError: A window is longer than the model's, the stride is longer than a window, the model has no
            meta-token to inject, an intervention does not fit the model, or the tokenizer is not the model's.
    """

    def __init__(
        self, model: PreTrainedModel | MetaTokenForCausalLM, tokenizer: Tokenizer, options: PerplexityOptions
    ) -> None:
        self._model: Any = model  # transformers' annotations lack attributes that every causal model has
        self._tokenizer = tokenizer
        limit = sequence_limit(model)
        positions = getattr(model.config, "max_position_embeddings", None)
        self.options = options = with_window(options, getattr(model.config, "trained_window", positions))
        self.encoder = TextEncoder(tokenizer)
        check_tokenizer(model, self.encoder)
        self.loss_policy: LossPolicy = getattr(model.config, "loss_policy", "skip")
        self._meta_token_id: int | None = getattr(model.config, "meta_token_id", None)
        if self._meta_token_id is None and options.injection.kind != "none":
            raise UsageError(
                f"injection.kind {options.injection.kind}",
                expected="a model with a meta-token",
                found="meta_token_id None",
                remedy="use injection.kind none",
            )
        check_interventions(model, options.interventions)
        self.text_tokens_per_window, self.positions_per_window = full_window(options)
        num_meta = self.positions_per_window - self.text_tokens_per_window
        warn_without_meta_tokens(options.injection, num_meta, f"a window of {options.window}")
        if options.interventions and not num_meta:
            warnings.warn("interventions act at meta-tokens, but the injection puts none into a window", stacklevel=3)
        has_no_end = reads_beyond_its_window(model)
        if limit is not None and self.positions_per_window > limit and not (options.extrapolate and has_no_end):
            remedy = "take a shorter window or extend the model"
            raise UsageError(
                f"window of {options.window} ({options.window_unit})",
                expected=f"at most {limit} positions (max_position_embeddings)",
                found=f"{self.positions_per_window}",
                remedy=f"{remedy}, or extrapolate" if has_no_end else remedy,
            )
        self.stride = options.stride or max(1, min(DEFAULT_STRIDE, self.text_tokens_per_window // 2))
        if self.stride > self.text_tokens_per_window:
            raise UsageError(
                "stride",
                expected=f"at most the {self.text_tokens_per_window} text tokens of a window",
                found=f"{self.stride}",
                remedy="lower stride or leave it out",
            )

    @torch.no_grad()
    def score(
        self,
        tokens: TokenIds,
        *,
        document_number: int,
        stride: int,
        on_read: Callable[[int], None] | None = None,
    ) -> FloatArray:
        """Return the loss of each token in nats, (num_tokens,) float64.

        Args:
            tokens: (num_tokens,) text tokens without an end of text.
            document_number: Part of the key of the injection.
            stride: Text tokens between the starts of windows.
            on_read: Called after each forward pass with the number of text tokens it read.
        """
        sequence = np.concatenate([[self.encoder.eos_token_id], tokens]).astype(np.int64)
        windows = lay_windows(len(tokens), window=self.text_tokens_per_window, stride=stride)
        losses = []
        for (num_text, num_scored), equal in groupby(windows, key=lambda window: (window.num_text, window.num_scored)):
            same_shape = list(equal)
            for start in range(0, len(same_shape), self.options.batch_size):
                batch = same_shape[start : start + self.options.batch_size]
                text = np.stack([sequence[w.start : w.start + num_text + 1] for w in batch])
                numbers = np.array([w.number for w in batch], dtype=np.int64)
                losses.append(self._score_batch(text, numbers, document_number, num_scored))
                if on_read is not None:
                    on_read(len(batch) * num_text)
        return np.concatenate(losses)

    def _score_batch(
        self, text: IntArray, window_numbers: IntArray, document_number: int, num_scored: int
    ) -> FloatArray:
        """Return the losses of the last `num_scored` targets of each row of `text` (B, N + 1), row after row."""
        num_text = text.shape[1] - 1
        is_full = num_text == self.text_tokens_per_window
        injection, block_size = fit_injection(
            self.options.injection, num_text, self.positions_per_window if is_full else None
        )
        meta_positions = sample_meta_positions(
            injection,
            sample_ids=window_numbers,
            block_size=block_size,
            seed=self.options.seed,
            epoch=document_number,
            text=text,
            ends_clause=self._ends_clause,
        )
        batch = inject_meta_tokens(
            text, meta_positions, meta_token_id=self._meta_token_id or 0, loss_policy=self.loss_policy
        )
        has_target = batch.targets != IGNORE_INDEX
        batch.targets[np.cumsum(has_target, axis=1) <= num_text - num_scored] = IGNORE_INDEX
        inputs = batch.to_model_inputs(device=self._model.device)
        with texts_of(self._model, batch.targets.shape[1]):
            return self._losses(inputs.pop("shift_labels"), **inputs)

    def _losses(self, targets: Tensor, **inputs: Tensor) -> FloatArray:
        head: Callable[[Tensor], Tensor]
        ours = self._model.config.model_type.startswith("metatokens")  # whatever its attention
        if ours or isinstance(self._model, PretrainedCausalLM):
            hidden = self._model.get_decoder()(**inputs, use_cache=False).last_hidden_state
            head = self._model.get_output_embeddings()
        else:
            # another model may transform its last hidden state before its head, so it computes the logits itself
            hidden, head = self._model(**inputs, use_cache=False).logits, nn.Identity()
        losses = token_losses(hidden, head, targets, vocab_size=self._model.config.vocab_size)
        result: FloatArray = losses.double().cpu().numpy()
        return result

    @cached_property
    def _ends_clause(self) -> BoolArray | None:
        return ends_clause_table(self._tokenizer) if self.options.injection.follows_punctuation else None


def token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, *, vocab_size: int) -> Tensor:
    """Return the cross-entropy of each valid target, in chunks of rows so that few logits exist at a time.

    Args:
        hidden: (..., C) final hidden states.
        head: Maps (rows, C) to logits (rows, V).
        targets: (...) int64; -100 is left out.
        vocab_size: V, for the size of a chunk.

    Returns:
        (num_targets,) float32 (float64 for float64 logits) in nats, in the order of `targets`.
    """
    keep = targets != IGNORE_INDEX
    hidden, targets = hidden[keep], targets[keep]
    num_rows = max(1, LOGITS_CHUNK_ELEMENTS // vocab_size)
    losses = []
    for start in range(0, len(targets), num_rows):
        logits = head(hidden[start : start + num_rows])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(nn.functional.cross_entropy(logits, targets[start : start + num_rows], reduction="none"))
    return torch.cat(losses)
