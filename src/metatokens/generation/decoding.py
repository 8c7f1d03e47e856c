"""Cached decoding with meta-tokens on a schedule.

A model never samples its meta-token, which was no target in training. Instead a schedule says where meta-tokens stand,
as the injection does in training (paper section 3). A schedule is a pure function of the tokens before a position. So
the prompt and its continuation join without a seam, and beams, padded batches and continued sequences get the layout
that each would get alone. `MetaTokenSchedule` enforces a schedule under `model.generate`; `generate_text` is the whole
way from a prompt to text. To return several sequences or use other strategies, call `model.generate`.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from metatokens.config.schema import DEFAULT_META_RATIO, Frozen
from metatokens.data.injection import BoolArray, IntArray
from metatokens.data.keyed_random import hash_key
from metatokens.data.tokenizer import META_TOKEN, TextEncoder, as_text_tokenizer
from metatokens.errors import UsageError
from metatokens.model.compatibility import BaseStreamer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from metatokens.data.tokenizer import AnyTokenizer
    from metatokens.model import MetaTokenForCausalLM

DEFAULT_TEXT_TOKENS = 100
_INCOMPLETE = "\ufffd"  # what the bytes of a character that is not finished decode to


# Schedules ---------------------------------------------------------------------------------------------------


class _ScheduleBase(Frozen, ABC):
    @property
    def is_empty(self) -> bool:
        """Tell whether no sequence, however long, gets a meta-token."""
        return False

    @abstractmethod
    def is_due(self, num_text: IntArray, num_meta: IntArray, after_meta: BoolArray) -> BoolArray:
        """Tell for each sequence whether a meta-token comes next.

        Args:
            num_text: (B,) text tokens so far, prompt included, padding not.
            num_meta: (B,) meta-tokens so far.
            after_meta: (B,) True where the last token is a meta-token.

        Returns:
            (B,) bool.
        """


class NoSchedule(_ScheduleBase):
    """No meta-token at all."""

    kind: Literal["none"] = "none"

    @property
    def is_empty(self) -> bool:
        """Return True."""
        return True

    def is_due(self, num_text: IntArray, num_meta: IntArray, after_meta: BoolArray) -> BoolArray:
        """Return False everywhere."""
        del num_text, num_meta
        return np.zeros_like(after_meta)


class PeriodicSchedule(_ScheduleBase):
    """One meta-token after every `text_tokens` text tokens; prompt and continuation count as one sequence."""

    kind: Literal["periodic"] = "periodic"
    text_tokens: int = Field(9, ge=1)
    """Text tokens between meta-tokens; 9 is the ratio 0.1."""

    def is_due(self, num_text: IntArray, num_meta: IntArray, after_meta: BoolArray) -> BoolArray:
        """Return True once after each multiple of `text_tokens`."""
        del num_meta
        due: BoolArray = (num_text > 0) & (num_text % self.text_tokens == 0) & ~after_meta
        return due


class UniformSchedule(_ScheduleBase):
    """A meta-token at each position with the same probability, drawn for each position on its own."""

    kind: Literal["uniform"] = "uniform"
    ratio: float = Field(DEFAULT_META_RATIO, ge=0, lt=1)
    """k: the probability that a position holds a meta-token."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the draws, which also depend on the position."""

    @property
    def is_empty(self) -> bool:
        """Tell whether the ratio is 0."""
        return self.ratio == 0

    def is_due(self, num_text: IntArray, num_meta: IntArray, after_meta: BoolArray) -> BoolArray:
        """Return True where the hash of (seed, position) is below the ratio."""
        del after_meta
        # the upper 53 bits as a number in [0, 1)
        draws = (hash_key(self.seed, num_text + num_meta) >> np.uint64(11)) * 2.0**-53
        due: BoolArray = draws < self.ratio
        return due


MetaSchedule = Annotated[NoSchedule | PeriodicSchedule | UniformSchedule, Field(discriminator="kind")]


def schedule_meta_tokens(
    text_ids: Sequence[int],
    schedule: MetaSchedule,
    *,
    meta_token_id: int,
) -> list[int]:
    """Return a prompt with its scheduled meta-tokens; generation adds one that is due after the last text token."""
    result: list[int] = []
    num_meta = 0
    for num_text, token in enumerate(text_ids):
        while _is_due_alone(schedule, num_text, num_meta, after_meta=result[-1:] == [meta_token_id]):
            result.append(meta_token_id)
            num_meta += 1
        result.append(token)
    return result


class MetaTokenSchedule(LogitsProcessor):
    """Forces the meta-token where the schedule has one, and forbids it elsewhere, under `model.generate`.

        model.generate(**inputs, logits_processor=LogitsProcessorList([MetaTokenSchedule(...)]))

    It runs after the processors that `generate` makes itself, so the meta-token is forced even if `suppress_tokens`
    holds it, as that of our models does. Its score is then 0, so it costs a beam nothing. Meta-tokens count as new
    tokens in `max_new_tokens`. A prompt should come with its meta-tokens (`schedule_meta_tokens`), since none are added
    to it here. Beside `inputs_embeds`, give `generate` the prompt's `input_ids` too, or the schedule cannot count it.
    Beam search that samples needs more than one candidate a beam and does not work with a forced token.
    """

    def __init__(self, schedule: MetaSchedule, *, meta_token_id: int, pad_token_id: int | None = None) -> None:
        """Take the schedule and the ids.

        Args:
            schedule: Where meta-tokens go.
            meta_token_id: The id to force.
            pad_token_id: Not counted, wherever it stands; it must not be a text token.
        """
        self.schedule = schedule
        self.meta_token_id = meta_token_id
        self.pad_token_id = pad_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return new scores (B, V) for the token after `input_ids` (B, T).

        Raises:
            ValueError: for a prompt of embeddings without its ids.
        """
        if not input_ids.shape[1]:
            raise ValueError(
                "the prompt has no ids, so a schedule cannot count it: give generate input_ids beside inputs_embeds"
            )
        is_meta = input_ids == self.meta_token_id
        is_text = ~is_meta
        if self.pad_token_id is not None:
            is_text &= input_ids != self.pad_token_id
        counts = torch.stack([is_text.sum(1), is_meta.sum(1), is_meta[:, -1:].sum(1)]).cpu().numpy()
        due = torch.from_numpy(self.schedule.is_due(counts[0], counts[1], counts[2] > 0)).to(scores.device)
        is_meta_column = torch.arange(scores.shape[1], device=scores.device) == self.meta_token_id
        scores = scores.masked_fill(is_meta_column ^ due[:, None], -torch.inf)
        return scores.masked_fill(is_meta_column & due[:, None], 0.0)


# Text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedText:
    """A continuation and its cost."""

    text: str
    """What follows the prompt, without the end of text; with `show_meta`, every generated meta-token as `_PAUSE_`."""
    text_tokens: int
    """Generated text tokens, without the end of text."""
    meta_tokens: int
    """Generated meta-tokens; those of the prompt do not count."""
    seconds: float
    """From the prompt's tokens to the last new one."""
    stopped_by: Literal["length", "end_of_text"]


def generate_text(  # noqa: PLR0913 every option of sampling
    model: PreTrainedModel | MetaTokenForCausalLM,
    tokenizer: AnyTokenizer,
    prompt: str,
    *,
    schedule: MetaSchedule,
    max_text_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
    show_meta: bool = False,
) -> GeneratedText:
    """Continue a prompt; the same arguments give the same text.

    The prompt is read as plain text, even if it spells a special token, and gets meta-tokens by the same schedule. An
    empty prompt becomes an end of text. The global random state and the model's mode are left as they were.

    Args:
        model: A `MetaTokenForCausalLM`, or with `NoSchedule` any causal language model of transformers.
        tokenizer: The model's, of transformers or as text tokenizer, or the model's folder.
        prompt: What to continue.
        schedule: Where meta-tokens go.
        max_text_tokens: Text tokens to generate at most; meta-tokens do not count. None means 100, or fewer where the
            model's window ends before.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Sample from the k likeliest tokens; None means from all.
        top_p: Sample from the likeliest tokens that hold this probability; None means from all.
        seed: Seed of the sampling.
        stream: Called with each new piece of text as soon as its characters are complete; the pieces add up to `text`.
        show_meta: Show generated meta-tokens.

    Raises:
        UsageError: A number is out of range, a schedule is given to a model without a meta-token, the tokenizer is not
            the model's, or the prompt and its continuation do not fit the model.
    """
    _check_sampling(max_text_tokens, temperature, top_k, top_p)
    tokenizer = as_text_tokenizer(tokenizer)
    encoder = TextEncoder(tokenizer)
    check_tokenizer(model, encoder)
    meta_token_id: int | None = getattr(model.config, "meta_token_id", None)
    if meta_token_id is None and schedule.kind != "none":
        raise UsageError(
            f"schedule {schedule.kind}",
            expected="a model with a meta-token",
            found="meta_token_id None",
            remedy="use the schedule none",
        )
    text_ids = encoder.encode_batch([prompt])[0].tolist() or [encoder.eos_token_id]
    prompt_ids = (
        text_ids if meta_token_id is None else schedule_meta_tokens(text_ids, schedule, meta_token_id=meta_token_id)
    )
    limit = sequence_limit(model)
    if max_text_tokens is None:
        max_text_tokens = _text_tokens_that_fit(len(text_ids), schedule, limit)
    num_new = _num_new_tokens(prompt_ids, len(text_ids), schedule, max_text_tokens, limit)
    if len(prompt_ids) + num_new == len(text_ids) + max_text_tokens and not schedule.is_empty:
        warnings.warn(
            f"schedule {schedule.kind} puts no meta-token into this prompt and {max_text_tokens} text tokens; generate "
            "more, or let meta-tokens come more often",
            stacklevel=2,
        )

    pad_token_id: int | None = getattr(model.config, "pad_token_id", None)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": num_new}
    # rows that pad the vocabulary belong to no token of this tokenizer
    unowned = range(encoder.vocab_size, model.config.vocab_size)
    settings["suppress_tokens"] = sorted({*(model.generation_config.suppress_tokens or ()), *unowned}) or None
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    if meta_token_id is not None:
        processor = MetaTokenSchedule(schedule, meta_token_id=meta_token_id, pad_token_id=pad_token_id)
        settings["logits_processor"] = LogitsProcessorList([processor])
    prompt_text = text_ids if prompt else []
    writer = _TextWriter(tokenizer, prompt_text, encoder.eos_token_id, meta_token_id, stream, show_meta)
    inputs = torch.tensor([prompt_ids], device=model.device)
    generate: Callable[..., Any] = cast(Any, model).generate
    started = time.perf_counter()
    with evaluating(model), _seeded(seed):
        generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=writer,
            eos_token_id=encoder.eos_token_id,
            pad_token_id=encoder.eos_token_id if pad_token_id is None else pad_token_id,
            **settings,
        )
    return GeneratedText(
        text="".join(writer.pieces),
        text_tokens=writer.num_text,
        meta_tokens=writer.num_meta,
        seconds=time.perf_counter() - started,
        stopped_by="end_of_text" if writer.has_ended else "length",
    )


def check_tokenizer(model: PreTrainedModel | MetaTokenForCausalLM, encoder: TextEncoder) -> None:
    """Raise UsageError unless the model can have been trained with this tokenizer.

    The meta-token is the first id after the text vocabulary; a model without one must have a row for every id.
    """
    meta_token_id: int | None = getattr(model.config, "meta_token_id", None)
    vocab_size: int = model.config.vocab_size
    if meta_token_id is not None and encoder.vocab_size != meta_token_id:
        expected = f"{meta_token_id} tokens (the model's meta_token_id)"
    elif encoder.vocab_size > vocab_size:
        expected = f"at most {vocab_size} tokens (the model's vocab_size)"
    else:
        return
    raise UsageError(
        "tokenizer",
        expected=expected,
        found=f"{encoder.vocab_size}",
        remedy="use the text tokenizer of the model's folder (load_text_tokenizer)",
    )


def sequence_limit(model: PreTrainedModel | MetaTokenForCausalLM) -> int | None:
    """Return the number of positions of the longest sequence, or None if the config states none."""
    limit: int | None = getattr(model.config, "max_sequence_length", None)
    return getattr(model.config, "max_position_embeddings", None) if limit is None else limit


class _TextWriter(BaseStreamer):
    """Turns generated ids into pieces of text; a piece ends with a complete character."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        eos_token_id: int,
        meta_token_id: int | None,
        stream: Callable[[str], None] | None,
        show_meta: bool,
    ) -> None:
        self.pieces: list[str] = []
        self.num_text = 0
        self.num_meta = 0
        self.has_ended = False
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._meta_token_id = meta_token_id
        self._stream = stream
        self._show_meta = show_meta
        self._is_prompt = True
        # ids from `_context` on are decoded again, and those before `_written` have been shown. The context matters: a
        # tokenizer that drops the space at the start of a text keeps it after other ids, such as the prompt's
        self._text_ids = [*prompt_ids]
        self._context, self._written = 0, len(prompt_ids)

    def put(self, value: Tensor) -> None:
        """Take new ids; the first call brings the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token == self._eos_token_id:
                self.has_ended = True
            elif token == self._meta_token_id:
                self.num_meta += 1
                if self._show_meta:
                    self._write(META_TOKEN)
            else:
                self.num_text += 1
                self._text_ids.append(token)
                self._write_new_text()

    def end(self) -> None:
        """Write the rest, even if its last character is incomplete."""
        self._write_new_text(is_last=True)

    def _write_new_text(self, is_last: bool = False) -> None:
        shown = self._decode(self._text_ids[self._context : self._written])
        text = self._decode(self._text_ids[self._context :])
        if len(text) > len(shown) and (is_last or not text.endswith(_INCOMPLETE)):
            self._context, self._written = self._written, len(self._text_ids)
            self._write(text[len(shown) :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _write(self, piece: str) -> None:
        self.pieces.append(piece)
        if self._stream is not None:
            self._stream(piece)


def _check_sampling(max_text_tokens: int | None, temperature: float, top_k: int | None, top_p: float | None) -> None:
    checks = (
        ("max_text_tokens", max_text_tokens, max_text_tokens is None or max_text_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "a finite number, at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0, at most 1"),
    )
    for name, value, is_valid, expected in checks:
        if not is_valid:
            raise UsageError(name, expected=expected, found=str(value), remedy=f"change {name}")


def _text_tokens_that_fit(num_text: int, schedule: MetaSchedule, limit: int | None) -> int:
    """Return how many text tokens fit the window behind a prompt, from 1 to 100; the check of one may still fail."""
    laid = schedule_meta_tokens([0] * (num_text + DEFAULT_TEXT_TOKENS), schedule, meta_token_id=-1)
    return max(1, laid[:limit].count(0) - num_text)


def _num_new_tokens(
    prompt_ids: list[int], num_text: int, schedule: MetaSchedule, max_text_tokens: int, limit: int | None
) -> int:
    """Return how many positions the new text tokens take with their meta-tokens, which the schedule alone decides."""
    num_meta = len(prompt_ids) - num_text
    last_text = num_text + max_text_tokens
    after_meta = False
    while num_text < last_text:
        if limit is not None and num_text + num_meta >= limit:
            raise UsageError(
                "prompt and continuation",
                expected=f"at most {limit} positions (max_position_embeddings)",
                found=f"a prompt of {len(prompt_ids)} and {max_text_tokens} text tokens with their meta-tokens",
                remedy="shorten the prompt, generate less or extend the model",
            )
        after_meta = _is_due_alone(schedule, num_text, num_meta, after_meta=after_meta)
        num_meta, num_text = num_meta + after_meta, num_text + (not after_meta)
    return num_text + num_meta - len(prompt_ids)


def _is_due_alone(schedule: MetaSchedule, num_text: int, num_meta: int, *, after_meta: bool) -> bool:
    return bool(schedule.is_due(np.array([num_text]), np.array([num_meta]), np.array([after_meta]))[0])


@contextmanager
def evaluating(model: PreTrainedModel | MetaTokenForCausalLM) -> Iterator[None]:
    """Put a model into evaluation mode within the block, and back into its own mode afterwards."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators and put back their states afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
