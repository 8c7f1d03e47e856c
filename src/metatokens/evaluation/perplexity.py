"""Perplexity of documents in windows, non-overlapping and sliding, with intervals over documents.

`metatokens.evaluation.windows` draws which tokens are scored with which context, and how meta-tokens take part;
`metatokens.evaluation.scoring` computes the losses, in nats. To compare two models, or one with and without an
intervention, pass their documents' nats to `bootstrap_paired_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metatokens.config.schema import LossPolicy
from metatokens.data.byte_level import TokenIds
from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer
from metatokens.errors import DataError, NumericError
from metatokens.evaluation.extrapolation import window_of
from metatokens.evaluation.interventions import intervene
from metatokens.evaluation.scoring import FloatArray, TokenScorer
from metatokens.evaluation.statistics import Interval, bootstrap_ratio
from metatokens.evaluation.windows import PerplexityOptions, WindowUnit, lay_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from metatokens.data.tokenizer import AnyTokenizer
    from metatokens.model import MetaTokenForCausalLM

Progress = Callable[[int, int], None]
"""Called with (text tokens read so far, text tokens to read); a token is read once by every window that holds it."""


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
    context_tokens: tuple[int, ...]
    """Text tokens in each of the result's `buckets`."""
    context_nats: tuple[float, ...]
    """Total of each bucket, in non-overlapping windows."""


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
    extrapolate: bool
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

    # the longest document reaches the last bucket
    buckets = _Buckets(scorer.text_tokens_per_window, max(len(document.tokens) for document in encoded))
    rows = []
    was_training = model.training
    model.train(False)
    try:
        counts = np.bincount(np.concatenate([document.tokens for document in encoded]))
        with window_of(model, scorer.positions_per_window), intervene(model, options.interventions, counts):
            for number, document in enumerate(encoded):
                nats, *sliding = [
                    scorer.score(document.tokens, document_number=number, stride=stride, on_read=report)
                    for stride in strides
                ]
                rows.append(_score_of(document, nats, (*sliding, nats)[0], buckets))
    finally:
        model.train(was_training)

    return PerplexityResult(
        non_overlapping=_window_scores(rows, [row.nats for row in rows], options.seed),
        sliding=_window_scores(rows, [row.sliding_nats for row in rows], options.seed),
        buckets=buckets.means(rows),
        documents=rows,
        text_tokens=sum(row.text_tokens for row in rows),
        words=sum(row.words for row in rows),
        window=options.window,
        window_unit=options.window_unit,
        text_tokens_per_window=scorer.text_tokens_per_window,
        positions_per_window=scorer.positions_per_window,
        stride=scorer.stride,
        extrapolate=options.extrapolate,
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


class _Buckets:
    """Buckets of context length in non-overlapping windows, by its binary digits: 0, 1, 2-3, 4-7 and so on."""

    def __init__(self, window: int, longest_document: int) -> None:
        self._window = window
        self._number = 1 + (min(window, longest_document) - 1).bit_length()

    def sums(self, nats: FloatArray) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the number of text tokens of a document in each bucket, and the sum of their losses."""
        digits = np.frexp(np.arange(len(nats)) % self._window)[1]
        tokens: list[int] = np.bincount(digits, minlength=self._number).tolist()
        totals: list[float] = np.bincount(digits, weights=nats, minlength=self._number).tolist()
        return tuple(tokens), tuple(totals)

    def means(self, rows: Sequence[DocumentScore]) -> list[ContextBucket]:
        """Return every bucket, over all documents."""
        tokens = np.sum([row.context_tokens for row in rows], axis=0)
        nats = np.sum([row.context_nats for row in rows], axis=0)
        return [
            ContextBucket(
                lowest_context=2**digits // 2,
                highest_context=min(2**digits, self._window) - 1,
                text_tokens=int(tokens[digits]),
                nats_per_token=float(nats[digits] / tokens[digits]),
            )
            for digits in range(self._number)
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


def _score_of(
    document: _EncodedDocument, nats: FloatArray, sliding_nats: FloatArray, buckets: _Buckets
) -> DocumentScore:
    totals = (float(nats.sum()), float(sliding_nats.sum()))
    if not np.isfinite(totals).all():
        raise NumericError(
            document.name,
            expected="finite losses",
            found="one that is not finite",
            remedy="check the weights, or load the model in float32",
        )
    return DocumentScore(document.name, len(nats), document.words, *totals, *buckets.sums(nats))


def _window_scores(rows: list[DocumentScore], nats: list[float], seed: int) -> WindowScores:
    per_token = bootstrap_ratio(nats, [row.text_tokens for row in rows], seed=seed)
    words = [row.words for row in rows]
    return WindowScores(
        nats=sum(nats),
        nats_per_token=per_token,
        perplexity=per_token.exp(),
        word_perplexity=bootstrap_ratio(nats, words, seed=seed).exp() if any(words) else None,
    )
