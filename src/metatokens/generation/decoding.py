"""From a prompt to text, with meta-tokens on a schedule.

`metatokens.model.schedule` has the schedules and the `generate` that follows them; `generate_text` is the whole way
from a prompt to text. To return several sequences or use other strategies, call `model.generate`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from metatokens.data.tokenizer import TextEncoder, as_text_tokenizer
from metatokens.errors import UsageError
from metatokens.generation.compressed import CompressedDocument, Read
from metatokens.generation.stepping import (
    Continuation,
    Sampler,
    decode_together,
    follows_steps,
    states_what_is_followed,
)
from metatokens.generation.writing import GeneratedText, TextWriter
from metatokens.graft.grafting import memory_of
from metatokens.model.configuration import ENDLESS
from metatokens.model.generation import MetaTokenGenerationMixin
from metatokens.model.schedule import (
    MetaSchedule,
    MetaTokenSchedule,
    NoSchedule,
    PeriodicSchedule,
    ThoughtSchedule,
    UniformSchedule,
    generate,
    read_schedule,
    schedule_meta_tokens,
    state_schedule,
)

if TYPE_CHECKING:
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
    "ThoughtSchedule",
    "UniformSchedule",
    "check_tokenizer",
    "evaluating",
    "follow_schedule",
    "generate_text",
    "generate_texts",
    "read_schedule",
    "schedule_for",
    "schedule_meta_tokens",
    "sequence_limit",
]

DEFAULT_TEXT_TOKENS = 100


class _Task(NamedTuple):
    """What to generate after a prompt, and where to write it."""

    prompt_ids: list[int]
    """With their meta-tokens."""
    num_new: int
    """New tokens at most, meta-tokens among them."""
    writer: TextWriter


class _Settings(NamedTuple):
    """How to generate."""

    schedule: MetaSchedule
    eos_token_id: int
    suppressed: list[int]
    """Ids that no step may choose."""
    sampling: dict[str, Any]
    """temperature, top_k and top_p."""
    seed: int
    memory: CompressedDocument | None
    """What was read before the prompts."""


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
    (result,) = generate_texts(
        *(model, tokenizer, [prompt]),
        schedule=schedule,
        max_text_tokens=max_text_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=None if stream is None else lambda _, piece: stream(piece),
        show_meta=show_meta,
        memory=memory,
    )
    return result


def generate_texts(  # noqa: PLR0913 every option of sampling
    model: PreTrainedModel | MetaTokenForCausalLM,
    tokenizer: AnyTokenizer,
    prompts: Sequence[str],
    *,
    schedule: MetaSchedule,
    max_text_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: Callable[[int, str], None] | None = None,
    show_meta: bool = False,
    memory: CompressedDocument | None = None,
) -> list[GeneratedText]:
    """Continue prompts of any lengths together, each as `generate_text` would alone.

    They share the passes over the weights, and each has random numbers of its own. Equal texts are promised as far as
    equal numbers are: a batch is added up in another order, which may decide between two tokens that are as likely.

    Args:
        model: See `generate_text`, as for all arguments that are not named here.
        tokenizer: See there.
        prompts: What to continue.
        schedule: See there.
        max_text_tokens: See there.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        seed: See there.
        stream: Called with the number of a prompt and each new piece of its text.
        show_meta: See there.
        memory: See there; it was read before each of the prompts, which then do not share their passes.

    Returns:
        In the order of the prompts; `seconds` are those of all together.

    Raises:
        UsageError: See `generate_text`.
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
    tasks = []
    for index, prompt in enumerate(prompts):
        if memory is not None:
            _check_memory(model, memory, prompt)
        text_ids = encoder.encode_batch([prompt])[0].tolist() or [encoder.eos_token_id]
        prompt_ids, num_new = _lay_out(
            model, text_ids, schedule, max_text_tokens, Read() if memory is None else memory.read
        )
        write = None if stream is None else partial(stream, index)
        shown = text_ids if prompt else []
        writer = TextWriter(tokenizer, shown, encoder.eos_token_id, meta_token_id, write, show_meta)
        tasks.append(_Task(prompt_ids, num_new, writer))

    # rows that pad the vocabulary belong to no token of this tokenizer
    unowned = range(encoder.vocab_size, model.config.vocab_size)
    suppressed = sorted({*(model.generation_config.suppress_tokens or ()), *unowned})
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = _Settings(schedule, encoder.eos_token_id, suppressed, sampling, seed, memory)
    started = time.perf_counter()
    with evaluating(model):
        (_in_own_steps if memory is not None or follows_steps(model) else _by_generate)(model, tasks, settings)
    seconds = time.perf_counter() - started
    return [task.writer.result(seconds) for task in tasks]


def _lay_out(
    model: Any, text_ids: list[int], schedule: MetaSchedule, max_text_tokens: int | None, before: Read
) -> tuple[list[int], int]:
    """Return a prompt with its meta-tokens, and how many new tokens follow it."""
    meta_token_id: int | None = getattr(model.config, "meta_token_id", None)
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
            stacklevel=3,
        )
    return prompt_ids, num_new


def _in_own_steps(model: Any, tasks: list[_Task], settings: _Settings) -> None:
    """Continue prompts with meta-tokens that take no step of their own."""
    suppressed = sorted({*settings.suppressed, *_ids_never_sampled(model)} - {settings.eos_token_id})
    wanted = []
    for task in tasks:
        generator = torch.Generator(model.device).manual_seed(settings.seed)
        sampler = Sampler(**settings.sampling, suppressed=suppressed, device=model.device, generator=generator)
        before = (0, 0) if settings.memory is None else settings.memory.read[:2]
        wanted.append(Continuation(task.prompt_ids, task.num_new, sampler, task.writer.write, *before))
    how: dict[str, Any] = {"schedule": settings.schedule, "eos_token_id": settings.eos_token_id}
    if settings.memory is None:
        decode_together(model, wanted, **how)
    else:
        for one in wanted:
            decode_together(model, [one], cache=settings.memory.to_cache(model), **how)
    for task in tasks:
        task.writer.end()


def _ids_never_sampled(model: Any) -> list[int]:
    """Return the ids that the model itself rules out; one of another package rules out none."""
    return model._ids_never_sampled() if isinstance(model, MetaTokenGenerationMixin) else []


def _check_memory(model: Any, memory: CompressedDocument, prompt: str) -> None:
    memory.check_model(model)
    if not prompt:
        raise UsageError(
            "prompt",
            expected="the text that follows the compressed document",
            found="none",
            remedy="ask something about the document",
        )
    if not states_what_is_followed(model):
        raise UsageError(
            "generation config",
            expected="settings that generation from a compressed document follows: sampling, lengths, ids",
            found=str(model.generation_config.to_diff_dict()),
            remedy="leave out the others",
        )


def _by_generate(model: Any, tasks: list[_Task], settings: _Settings) -> None:
    """Continue one prompt after another with all that transformers can do, and a step for each meta-token."""
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    temperature, top_k, top_p = settings.sampling.values()
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    pad_token_id: int | None = getattr(model.config, "pad_token_id", None)
    for task in tasks:
        inputs = torch.tensor([task.prompt_ids], device=model.device)
        with _seeded(settings.seed):
            generate(
                model=getattr(model, "wrapped", model),
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                meta_schedule=settings.schedule,
                streamer=task.writer,
                max_new_tokens=task.num_new,
                suppress_tokens=settings.suppressed or None,
                eos_token_id=settings.eos_token_id,
                pad_token_id=settings.eos_token_id if pad_token_id is None else pad_token_id,
                **how,
            )


def schedule_for(injection: Injection) -> MetaSchedule | None:
    """Return the schedule that puts meta-tokens where training with this injection had them, as far as there is one.

    Uniform injection becomes a uniform schedule of its ratio, and so does punctuation, which no schedule can follow
    because it depends on the text; thoughts after punctuation become thoughts at even places. Positions in a block have
    no schedule.
    """
    match injection.kind:
        case "none":
            return NoSchedule()
        case "uniform" | "punctuation":
            return UniformSchedule(ratio=injection.ratio)
        case "periodic" | "thought" if injection.ratio == 0:
            return NoSchedule()
        case "periodic":
            return PeriodicSchedule(text_tokens=max(1, round(1 / injection.ratio) - 1))
        case "thought":
            num_tokens = injection.num_tokens
            return ThoughtSchedule(max(1, round(num_tokens * (1 / injection.ratio - 1))), num_tokens)
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
    if (memory := memory_of(model)) is not None and memory[0].positions == "compact":
        return ENDLESS
    limit: int | None = getattr(model.config, "max_sequence_length", None)
    return getattr(model.config, "max_position_embeddings", None) if limit is None else limit


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
