"""From a prompt to text, with meta-tokens on a schedule.

`metatokens.model.schedule` has the schedules and the `generate` that follows them; `generate_text` is the whole way
from a prompt to text. To return several sequences or use other strategies, call `model.generate`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from metatokens.data.tokenizer import META_TOKEN, TextEncoder, as_text_tokenizer
from metatokens.errors import UsageError
from metatokens.generation.compressed import CompressedDocument, Read
from metatokens.generation.stepping import Sampler, decode, follows_steps
from metatokens.model.compatibility import BaseStreamer
from metatokens.model.generation import MetaTokenGenerationMixin
from metatokens.model.schedule import (
    MetaSchedule,
    MetaTokenSchedule,
    NoSchedule,
    PeriodicSchedule,
    UniformSchedule,
    generate,
    read_schedule,
    schedule_meta_tokens,
    state_schedule,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from metatokens.config.schema import Injection
    from metatokens.data.tokenizer import AnyTokenizer
    from metatokens.model import MetaTokenForCausalLM

__all__ = [
    "GeneratedText",
    "MetaSchedule",
    "MetaTokenSchedule",
    "NoSchedule",
    "PeriodicSchedule",
    "UniformSchedule",
    "check_tokenizer",
    "evaluating",
    "follow_schedule",
    "generate_text",
    "read_schedule",
    "schedule_for",
    "schedule_meta_tokens",
    "sequence_limit",
]

DEFAULT_TEXT_TOKENS = 100
_INCOMPLETE = "\ufffd"  # what the bytes of a character that is not finished decode to


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


class _Continuation(NamedTuple):
    """What to generate after a prompt."""

    prompt_ids: list[int]
    """With their meta-tokens."""
    schedule: MetaSchedule
    num_new: int
    """New tokens at most, meta-tokens among them."""
    eos_token_id: int
    suppressed: list[int]
    """Ids that no step may choose."""
    sampling: dict[str, Any]
    """temperature, top_k and top_p."""
    memory: CompressedDocument | None = None
    """What was read before the prompt."""


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
    memory: CompressedDocument | None = None,
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
        memory: A document that the model has read before the prompt; its schedule should be the same.

    Raises:
        UsageError: A number is out of range, a schedule is given to a model without a meta-token, the tokenizer is not
            the model's, the prompt and its continuation do not fit the model, or another model has read the document.
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
    if memory is not None:
        _check_memory(model, memory, prompt)
    before = Read() if memory is None else memory.read
    text_ids = encoder.encode_batch([prompt])[0].tolist() or [encoder.eos_token_id]
    prompt_ids = text_ids
    if meta_token_id is not None:
        prompt_ids = schedule_meta_tokens(text_ids, schedule, meta_token_id=meta_token_id, **before._asdict())
    limit = sequence_limit(model)
    if max_text_tokens is None:
        max_text_tokens = _text_tokens_that_fit(len(text_ids), schedule, limit, before)
    num_new = _num_new_tokens(prompt_ids, len(text_ids), schedule, max_text_tokens, limit, before)
    if len(prompt_ids) + num_new == len(text_ids) + max_text_tokens and not schedule.is_empty:
        warnings.warn(
            f"schedule {schedule.kind} puts no meta-token into this prompt and {max_text_tokens} text tokens; generate "
            "more, or let meta-tokens come more often",
            stacklevel=2,
        )

    # rows that pad the vocabulary belong to no token of this tokenizer
    unowned = range(encoder.vocab_size, model.config.vocab_size)
    suppressed = sorted({*(model.generation_config.suppress_tokens or ()), *unowned})
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    wanted = _Continuation(prompt_ids, schedule, num_new, encoder.eos_token_id, suppressed, sampling, memory)
    prompt_text = text_ids if prompt else []
    writer = _TextWriter(tokenizer, prompt_text, encoder.eos_token_id, meta_token_id, stream, show_meta)
    started = time.perf_counter()
    with evaluating(model), _seeded(seed):
        (_in_own_steps if memory is not None or follows_steps(model) else _by_generate)(model, wanted, writer)
    return GeneratedText(
        text="".join(writer.pieces),
        text_tokens=writer.num_text,
        meta_tokens=writer.num_meta,
        seconds=time.perf_counter() - started,
        stopped_by="end_of_text" if writer.has_ended else "length",
    )


def _in_own_steps(model: Any, wanted: _Continuation, writer: _TextWriter) -> None:
    """Continue a prompt with meta-tokens that take no step of their own."""
    suppressed = {*wanted.suppressed, *model._ids_never_sampled()} - {wanted.eos_token_id}
    sampler = Sampler(**wanted.sampling, suppressed=sorted(suppressed), device=model.device)
    decode(
        model,
        wanted.prompt_ids,
        schedule=wanted.schedule,
        num_new=wanted.num_new,
        eos_token_id=wanted.eos_token_id,
        sampler=sampler,
        emit=writer.write,
        **_continue_from(model, wanted.memory),
    )
    writer.end()


def _continue_from(model: Any, memory: CompressedDocument | None) -> dict[str, Any]:
    if memory is None:
        return {}
    return {"cache": memory.to_cache(model), "num_text": memory.read.num_text, "num_meta": memory.read.num_meta}


def _check_memory(model: Any, memory: CompressedDocument, prompt: str) -> None:
    memory.check_model(model)
    if not prompt:
        raise UsageError(
            "prompt",
            expected="the text that follows the compressed document",
            found="none",
            remedy="ask something about the document",
        )
    if not follows_steps(model):
        raise UsageError(
            "generation config",
            expected="settings that generation from a compressed document follows: sampling, lengths, ids",
            found=str(model.generation_config.to_diff_dict()),
            remedy="leave out the others",
        )


def _by_generate(model: Any, wanted: _Continuation, writer: _TextWriter) -> None:
    """Continue a prompt with all that transformers can do, and a step for each meta-token."""
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    temperature, top_k, top_p = wanted.sampling.values()
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    pad_token_id: int | None = getattr(model.config, "pad_token_id", None)
    inputs = torch.tensor([wanted.prompt_ids], device=model.device)
    generate(
        model=getattr(model, "wrapped", model),
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        meta_schedule=wanted.schedule,
        streamer=writer,
        max_new_tokens=wanted.num_new,
        suppress_tokens=wanted.suppressed or None,
        eos_token_id=wanted.eos_token_id,
        pad_token_id=wanted.eos_token_id if pad_token_id is None else pad_token_id,
        **settings,
    )


def schedule_for(injection: Injection) -> MetaSchedule | None:
    """Return the schedule that puts meta-tokens where training with this injection had them, as far as there is one.

    Uniform injection becomes a uniform schedule of its ratio, and so does punctuation, which no schedule can follow
    because it depends on the text. Positions in a block have no schedule.
    """
    match injection.kind:
        case "none":
            return NoSchedule()
        case "uniform" | "punctuation":
            return UniformSchedule(ratio=injection.ratio)
        case "periodic" if injection.ratio == 0:
            return NoSchedule()
        case "periodic":
            return PeriodicSchedule(text_tokens=max(1, round(1 / injection.ratio) - 1))
        case "explicit":
            return None


def follow_schedule(model: Any, schedule: Any = None) -> None:
    """Have a model's `generate` follow a schedule; None means the one in its generation config.

    The models of this package do so anyway. One of another package gets `metatokens.model.schedule.generate` for its
    own, as transformers gives it one that comes with a checkpoint.

    Args:
        model: A causal language model of transformers.
        schedule: A schedule, a mapping, or a kind; see `metatokens.model.schedule.read_schedule`.

    Raises:
        ValueError: `schedule` is no schedule, or puts meta-tokens into the text of a model that has none.
    """
    if schedule is not None:
        state_schedule(model.generation_config, read_schedule(schedule))
    followed = read_schedule(getattr(model.generation_config, "meta_schedule", None))
    has_meta_token = getattr(model.config, "meta_token_id", None) is not None
    if followed is not None and not followed.is_empty and not has_meta_token:
        raise ValueError(f"meta_schedule {followed.kind} needs a model with a meta-token, and meta_token_id is None")
    if not isinstance(model, MetaTokenGenerationMixin):
        model.generate = partial(generate, model=model)


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
            self.write(token)

    def write(self, token: int) -> None:
        """Take a new token."""
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


def _text_tokens_that_fit(num_text: int, schedule: MetaSchedule, limit: int | None, before: Read) -> int:
    """Return how many text tokens fit the window behind a prompt, from 1 to 100; the check of one may still fail."""
    laid = schedule_meta_tokens([0] * (num_text + DEFAULT_TEXT_TOKENS), schedule, meta_token_id=-1, **before._asdict())
    room = None if limit is None else max(0, limit - before.num_positions)
    return max(1, laid[:room].count(0) - num_text)


def _num_new_tokens(
    prompt_ids: list[int], num_text: int, schedule: MetaSchedule, max_text_tokens: int, limit: int | None, before: Read
) -> int:
    """Return how many positions the new text tokens take with their meta-tokens, which the schedule alone decides."""
    num_meta = len(prompt_ids) - num_text + before.num_meta
    num_text += before.num_text
    last_text = num_text + max_text_tokens
    after_meta = False
    while num_text < last_text:
        if limit is not None and num_text + num_meta >= limit:
            raise UsageError(
                "prompt and continuation",
                expected=f"at most {limit} positions (max_position_embeddings)",
                found=f"a prompt of {len(prompt_ids) + before.num_positions} and {max_text_tokens} text tokens with "
                "their meta-tokens",
                remedy="shorten the prompt, generate less or extend the model",
            )
        after_meta = schedule.is_due(num_text, num_meta, after_meta)
        num_meta, num_text = num_meta + after_meta, num_text + (not after_meta)
    return num_text + num_meta - len(prompt_ids) - before.num_positions


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
