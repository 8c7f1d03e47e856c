"""Windowed perplexity of documents: which tokens are scored, with which context, and how meta-tokens take part.

Every document is scored on its own, with an end of text (#) before its tokens. A window of L text tokens has L inputs
and the L targets that they predict, so its input begins with the token before its first target. With the document
a b c d e f g, L = 4 and S = 2 (an earlier window has scored the targets in brackets):

    windows              number   input      targets
    non-overlapping         0     # a b c     a  b  c  d
                            1     d e f       e  f  g
    sliding by S            0     # a b c     a  b  c  d
                            1     b c d e    [c][d] e  f
                            2     d e f      [e][f] g

Observe that both kinds score every text token exactly once, including the first, from the end of text alone, and those
of the last, partial window. The end of text is never a target.
Observe that non-overlapping windows score token j of a window (counted from 0) from the j tokens before it in the
window and the one before the window. So their mean includes short contexts; the buckets separate them. Sliding windows
after the first give every token at least L - S tokens of context.

Meta-tokens are inserted into the input of each window, keyed by (seed, epoch = document number, sample = window
number). They are never targets. The model's loss policy decides which output predicts a text token. `window_unit`
"text" gives every injection the same text windows, with the M meta-tokens on top; "positions" gives every injection the
same number of positions. A partial window keeps the ratio. Under the policy punctuation the layout depends on all the
text of its window, later text included, so its perplexity is not strictly causal; the other layouts ignore the text.

The windows are those of Landmark Attention (non-overlapping, but it drops the partial one) and YaRN (sliding by 256).
Losses are in nats (natural logarithms). Probabilities are computed in float32 or better, over the whole vocabulary
including meta-token and padding, as in training. To compare two models, or one with and without an intervention, pass
their documents' nats to `bootstrap_paired_ratio`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.config.schema import ExplicitInjection, Frozen, Injection, LossPolicy, NoInjection
from metatokens.data.byte_level import TokenIds
from metatokens.data.injection import (
    IGNORE_INDEX,
    BoolArray,
    IntArray,
    inject_meta_tokens,
    sample_meta_positions,
    warn_without_meta_tokens,
)
from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer, ends_clause_table
from metatokens.errors import DataError, NumericError, UsageError
from metatokens.evaluation.interventions import Intervention, check_interventions, intervene
from metatokens.evaluation.statistics import Interval, bootstrap_ratio
from metatokens.generation.decoding import check_tokenizer, sequence_limit
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from metatokens.data.tokenizer import AnyTokenizer
    from metatokens.model import MetaTokenForCausalLM

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called with (text tokens read so far, text tokens to read); a token is read once by every window that holds it."""

DEFAULT_STRIDE = 256  # YaRN, jquesnelle/yarn@master:eval/perplexity.py
WindowUnit = Literal["text", "positions"]


class PerplexityOptions(Frozen):
    """How documents are cut into windows, and which meta-tokens and interventions are applied."""

    window: int | None = Field(None, ge=1)
    """L: length of a window, in `window_unit`; off means all positions of the model."""
    window_unit: WindowUnit = "text"
    """text: L text tokens and the meta-tokens on top; positions: L positions, meta-tokens among them."""
    stride: int | None = Field(None, ge=1)
    """S: text tokens that the sliding windows move by; by default 256, or half a window's text tokens if that is less,
    so that windows overlap. With S = a window's text tokens, both kinds of windows are the same and scored once."""
    injection: Injection = NoInjection()
    """Meta-tokens of a window."""
    interventions: tuple[Intervention, ...] = ()
    """Changes to the model at the meta-tokens; `mean_embedding` is the mean over the scored tokens."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the injection and of the bootstrap."""
    max_tokens_per_document: int | None = Field(None, ge=1)
    """How many text tokens of every document to score, from its start; off means all."""
    batch_size: int = Field(8, ge=1)
    """Windows per forward pass."""


@dataclass(frozen=True)
class Window:
    """A stretch of one document."""

    number: int
    """Its number in the document, from 0; part of the key of its injection."""
    start: int
    """Text tokens of the document before its first target."""
    num_text: int
    """Number of its targets, and of its text inputs."""
    num_scored: int
    """Number of targets scored, counted from the end."""


@dataclass(frozen=True)
class WindowScores:
    """The result of one way of cutting windows, each text token scored once."""

    nats: float
    """Total over all documents."""
    nats_per_token: Interval
    """Mean over text tokens; 95% bootstrap interval over documents."""
    perplexity: Interval
    """exp(nats per text token)."""
    word_perplexity: Interval | None
    """exp(total nats / whitespace words), independent of the tokenizer; None if there is no word."""


@dataclass(frozen=True)
class ContextBucket:
    """Mean loss of the tokens with about the same context, in non-overlapping windows."""

    lowest_context: int
    """Text tokens between the window's start and the target; the one before the window does not count."""
    highest_context: int
    """Inclusive."""
    text_tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class DocumentScore:
    """The contribution of one document to the sums."""

    name: str
    text_tokens: int
    words: int
    """Whitespace words of the scored text."""
    nats: float
    """Total in non-overlapping windows."""
    sliding_nats: float
    """Total in sliding windows."""


@dataclass(frozen=True)
class PerplexityResult:
    """All measurements, and the options that repeat them; `dataclasses.asdict` gives values that JSON can hold."""

    non_overlapping: WindowScores
    sliding: WindowScores
    buckets: list[ContextBucket]
    documents: list[DocumentScore]
    text_tokens: int
    words: int
    window: int
    window_unit: WindowUnit
    text_tokens_per_window: int
    positions_per_window: int
    stride: int
    injection: dict[str, Any]
    interventions: list[dict[str, Any]]
    seed: int
    loss_policy: LossPolicy
    max_tokens_per_document: int | None
    batch_size: int
    tokenizer_sha256: str
    dtype: str
    device: str

    @property
    def nats_per_token(self) -> Interval:
        """Nats per text token in non-overlapping windows."""
        return self.non_overlapping.nats_per_token

    @property
    def perplexity(self) -> Interval:
        """Perplexity per text token in non-overlapping windows."""
        return self.non_overlapping.perplexity


def measure_perplexity(
    model: PreTrainedModel | MetaTokenForCausalLM,
    documents: str | Iterable[str | tuple[str, str]],
    tokenizer: AnyTokenizer,
    options: PerplexityOptions | None = None,
    *,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score every document in non-overlapping and in sliding windows.

    Args:
        model: A `MetaTokenForCausalLM`; with the injection none, any causal language model of transformers. It runs in
            evaluation mode and returns to its own mode afterwards. A meta-token model computes its logits in chunks;
            another model holds those of a whole batch in memory.
        documents: One text or several, each alone or as (name, text); strings that look like special tokens are plain
            text.
        tokenizer: The model's, of transformers or as text tokenizer, or the model's folder.
        options: The protocol; None means the defaults.
        progress: Called after every forward pass.

    Raises:
        DataError: There is no document, or one has no token.
        UsageError: A window is longer than the model's, the stride is longer than a window, the model has no
            meta-token to inject, an intervention does not fit the model, or the tokenizer is not the model's.
        NumericError: A loss is not finite.
    """
    tokenizer = as_text_tokenizer(tokenizer)
    scorer = TokenScorer(model, tokenizer, options or PerplexityOptions())
    options = scorer.options
    encoded = list(_encode_documents(_named(documents), scorer.encoder, tokenizer, options.max_tokens_per_document))
    if not encoded:
        raise DataError("documents", expected="at least one", found="none", remedy="name a source that holds text")
    strides = [scorer.text_tokens_per_window]
    if scorer.stride != scorer.text_tokens_per_window:
        strides.append(scorer.stride)
    assert options.window is not None  # the scorer has filled it in
    report = _progress_reporter(encoded, scorer.text_tokens_per_window, strides, progress)

    sums = _BucketSums(scorer.text_tokens_per_window)
    rows = []
    was_training = model.training
    model.train(False)
    try:
        with intervene(model, options.interventions, np.bincount(np.concatenate([d.tokens for d in encoded]))):
            for number, document in enumerate(encoded):
                nats, *sliding = [
                    scorer.score(document.tokens, document_number=number, stride=stride, on_read=report)
                    for stride in strides
                ]
                sums.add(nats)
                rows.append(_score_of(document, nats, (*sliding, nats)[0]))
    finally:
        model.train(was_training)

    return PerplexityResult(
        non_overlapping=_window_scores(rows, [row.nats for row in rows], options.seed),
        sliding=_window_scores(rows, [row.sliding_nats for row in rows], options.seed),
        buckets=sums.buckets(),
        documents=rows,
        text_tokens=sum(row.text_tokens for row in rows),
        words=sum(row.words for row in rows),
        window=options.window,
        window_unit=options.window_unit,
        text_tokens_per_window=scorer.text_tokens_per_window,
        positions_per_window=scorer.positions_per_window,
        stride=scorer.stride,
        injection=options.injection.model_dump(mode="json"),
        interventions=[intervention.model_dump(mode="json") for intervention in options.interventions],
        seed=options.seed,
        loss_policy=scorer.loss_policy,
        max_tokens_per_document=options.max_tokens_per_document,
        batch_size=options.batch_size,
        tokenizer_sha256=scorer.encoder.sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def lay_windows(num_tokens: int, *, window: int, stride: int) -> list[Window]:
    """Return the windows of a document of `num_tokens` text tokens; with `stride` = `window` they do not overlap.

    Window number w begins before token w * stride; the last one ends with the document and may be shorter.

    Args:
        num_tokens: Text tokens of the document, at least 1.
        window: Text tokens of a window.
        stride: Text tokens between the starts of windows, at most `window`.
    """
    windows = []
    scored = 0
    for number in range(1 + -(-max(0, num_tokens - window) // stride)):
        start = number * stride
        end = min(start + window, num_tokens)
        windows.append(Window(number, start, end - start, end - scored))
        scored = end
    return windows


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
        UsageError: See `measure_perplexity`.
    """

    def __init__(
        self, model: PreTrainedModel | MetaTokenForCausalLM, tokenizer: Tokenizer, options: PerplexityOptions
    ) -> None:
        self._model: Any = model  # transformers' annotations lack attributes that every causal model has
        self._tokenizer = tokenizer
        self.options = options = _with_window(options, sequence_limit(model))
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
        self.text_tokens_per_window, self.positions_per_window = _full_window(options)
        num_meta = self.positions_per_window - self.text_tokens_per_window
        warn_without_meta_tokens(options.injection, num_meta, f"a window of {options.window}")
        if options.interventions and not num_meta:
            warnings.warn("interventions act at meta-tokens, but the injection puts none into a window", stacklevel=3)
        limit = sequence_limit(model)
        if limit is not None and self.positions_per_window > limit:
            raise UsageError(
                f"window of {options.window} ({options.window_unit})",
                expected=f"at most {limit} positions (max_position_embeddings)",
                found=f"{self.positions_per_window}",
                remedy="take a shorter window or extend the model",
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
        injection, block_size = _fit_injection(
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
        return ends_clause_table(self._tokenizer) if self.options.injection.kind == "punctuation" else None


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


class _BucketSums:
    """Sums of losses in buckets of context length: 0, 1, 2-3, 4-7 and so on, by its number of binary digits."""

    def __init__(self, window: int) -> None:
        self._window = window
        num_buckets = 1 + (window - 1).bit_length()
        self._text_tokens = np.zeros(num_buckets, dtype=np.int64)
        self._nats = np.zeros(num_buckets)

    def add(self, nats: FloatArray) -> None:
        """Add the losses of a document in non-overlapping windows."""
        digits = np.frexp(np.arange(len(nats)) % self._window)[1]
        self._text_tokens += np.bincount(digits, minlength=len(self._nats))
        self._nats += np.bincount(digits, weights=nats, minlength=len(self._nats))

    def buckets(self) -> list[ContextBucket]:
        """Return the buckets that hold a token."""
        return [
            ContextBucket(
                lowest_context=2**digits // 2,
                highest_context=min(2**digits, self._window) - 1,
                text_tokens=int(self._text_tokens[digits]),
                nats_per_token=float(self._nats[digits] / self._text_tokens[digits]),
            )
            for digits in np.flatnonzero(self._text_tokens).tolist()
        ]


@dataclass(frozen=True)
class _EncodedDocument:
    name: str
    tokens: TokenIds
    words: int


def _named(documents: str | Iterable[str | tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each document; those without a name are numbered from 1."""
    for number, document in enumerate([documents] if isinstance(documents, str) else documents, start=1):
        if isinstance(document, str):
            document = f"text {number}", document  # noqa: PLW2901 the same with a name
        if not (isinstance(document, tuple) and len(document) == 2 and all(isinstance(part, str) for part in document)):
            raise TypeError(f"a document is a string or a pair (name, text), not {type(document).__name__}")
        yield document


def _encode_documents(
    documents: Iterable[tuple[str, str]], encoder: TextEncoder, tokenizer: Tokenizer, max_tokens: int | None
) -> Iterator[_EncodedDocument]:
    for name, text in documents:
        tokens = encoder.encode_batch([text])[0]
        if not len(tokens):
            raise DataError(name, expected="text", found="an empty document", remedy="leave it out")
        if max_tokens is not None and len(tokens) > max_tokens:
            # a copy, so that the rest of a long document can be freed
            tokens = tokens[:max_tokens].copy()
            text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)  # noqa: PLW2901 the scored part of it
        yield _EncodedDocument(name, tokens, len(text.split()))


def _with_window(options: PerplexityOptions, limit: int | None) -> PerplexityOptions:
    """Return the options with the window of a model of at most `limit` positions, if they name none."""
    if options.window is not None:
        return options
    if limit is None:
        raise UsageError(
            "window", expected="a length, as the model states none", found="nothing", remedy="name a window, as 1024"
        )
    return options.model_copy(update={"window": limit, "window_unit": "positions"})


def _full_window(options: PerplexityOptions) -> tuple[int, int]:
    """Return the text tokens and the positions of a full window."""
    assert options.window is not None
    if options.window_unit == "text":
        return options.window, _fit_injection(options.injection, options.window)[1]
    injection = options.injection
    if injection.kind == "explicit":
        num_meta = sum(position < options.window for position in injection.positions)
    else:
        num_meta = injection.num_meta(options.window)
    if num_meta >= options.window:
        raise UsageError(
            f"window of {options.window} positions",
            expected="at least one text token",
            found=f"{num_meta} meta-tokens",
            remedy="lower injection.ratio or take a longer window",
        )
    return options.window - num_meta, options.window


def _fit_injection(injection: Injection, num_text: int, block_size: int | None = None) -> tuple[Injection, int]:
    """Return the injection for a block with `num_text` text tokens, and the block's positions.

    Without a `block_size` the ratio k counts text and meta-tokens together, as in `inject_into_prompt`: M is the
    smallest solution of M = round(k (N + M)). Explicit positions beyond the text are left out.
    """
    if injection.kind == "explicit":
        reached = tuple(position for j, position in enumerate(injection.positions) if position <= num_text + j)
        return ExplicitInjection(positions=reached), num_text + len(reached)
    if block_size is not None:
        return injection, block_size
    num_meta = 0
    while (more := injection.num_meta(num_text + num_meta)) > num_meta:
        num_meta = more
    return injection, num_text + num_meta


def _progress_reporter(
    documents: list[_EncodedDocument], window: int, strides: list[int], progress: Progress | None
) -> Callable[[int], None] | None:
    if progress is None:
        return None
    lengths = [len(document.tokens) for document in documents]
    laid = (lay_windows(length, window=window, stride=stride) for length in lengths for stride in strides)
    total = sum(w.num_text for windows in laid for w in windows)
    done = 0

    def report(num_read: int) -> None:
        nonlocal done
        done += num_read
        progress(done, total)

    return report


def _score_of(document: _EncodedDocument, nats: FloatArray, sliding_nats: FloatArray) -> DocumentScore:
    totals = (float(nats.sum()), float(sliding_nats.sum()))
    if not np.isfinite(totals).all():
        raise NumericError(
            document.name,
            expected="finite losses",
            found="one that is not finite",
            remedy="check the weights, or load the model in float32",
        )
    return DocumentScore(document.name, len(nats), document.words, *totals)


def _window_scores(rows: list[DocumentScore], nats: list[float], seed: int) -> WindowScores:
    per_token = bootstrap_ratio(nats, [row.text_tokens for row in rows], seed=seed)
    words = [row.words for row in rows]
    return WindowScores(
        nats=sum(nats),
        nats_per_token=per_token,
        perplexity=per_token.exp(),
        word_perplexity=bootstrap_ratio(nats, words, seed=seed).exp() if any(words) else None,
    )
