"""The contenders of generation: one function each, which builds a model and the call that continues prompts with it.

All have the same width, depth, heads and vocabulary, choose the likeliest token, and continue the same prompts by as
many positions. A `Clock` notes when tokens come, so that reading the prompt and decoding are timed apart.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from metatokens.bench.measuring import Registry
from metatokens.config.bench import GenerationBench, ModelBench
from metatokens.config.schema import ModelConfig
from metatokens.generation import stepping
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.compatibility import BaseStreamer
from metatokens.model.schedule import MetaSchedule, NoSchedule, PeriodicSchedule, schedule_meta_tokens
from metatokens.training.initialization import build_model

GENERATION = Registry()


class Clock(BaseStreamer):
    """Notes when tokens come; transformers calls it with the prompt first."""

    def __init__(self, meta_token_id: int, *, knows_prompt: bool) -> None:
        """Start now."""
        self.meta_token_id = meta_token_id
        self.started = time.perf_counter()
        self.steps: list[tuple[float, dict[int, int]]] = []
        """When each step was done, and the tokens that rows got in it."""
        self._is_prompt = not knows_prompt

    def put(self, value: Tensor) -> None:
        """Take the tokens of a step, (B,)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.write(dict(enumerate(value.flatten().tolist())))

    def write(self, tokens: dict[int, int]) -> None:
        """Take the tokens of a step, by row."""
        self.steps.append((time.perf_counter(), tokens))

    def write_one(self, row: int, token: int) -> None:
        """Take the token of one row."""
        self.write({row: token})

    def end(self) -> None:
        """Do nothing more."""

    def text_of(self, tokens: dict[int, int]) -> dict[int, int]:
        """Leave the meta-tokens of a step out."""
        return {row: token for row, token in tokens.items() if token != self.meta_token_id}


class Prompts(NamedTuple):
    """Text to continue: one row, or rows of different lengths, padded on the left."""

    rows: list[list[int]]
    """Text tokens."""
    num_new: int
    """Positions to continue by, meta-tokens among them."""
    schedule: MetaSchedule
    """Where a model with meta-tokens puts them."""
    length: int
    """Positions that a model must hold."""


class Continuation(NamedTuple):
    """A model and how it continues the prompts."""

    model: Any
    run: Callable[[Clock], Any]
    """Continue all prompts and give the clock each token."""
    schedule: MetaSchedule
    knows_prompt: bool = False
    """The clock is given new tokens alone."""


def make_prompts(settings: GenerationBench) -> Prompts:
    """Draw prompts; with several rows, their lengths rise evenly to the whole."""
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, settings.prompt * (row + 1) // settings.batch) for row in range(settings.batch)]
    rows = [torch.randint(settings.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    every = max(1, round(1 / settings.ratio) - 1)
    num_new = settings.new + settings.new // every
    longest = settings.prompt + settings.prompt // every + num_new
    return Prompts(rows, num_new, PeriodicSchedule(text_tokens=every), longest)


@GENERATION.add()
def plain_steps(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Plain model, by the steps of `generate_text`."""
    return _by_steps(_build(settings, prompts, meta_attention_layers="none"), prompts, NoSchedule())


@GENERATION.add()
def plain_generate(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Plain model, by `generate`."""
    return _by_generate(_build(settings, prompts, meta_attention_layers="none"), prompts, NoSchedule())


@GENERATION.add()
def meta_steps(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Meta-attention with scheduled meta-tokens, by the steps of `generate_text`."""
    return _by_steps(_build(settings, prompts), prompts, prompts.schedule)


@GENERATION.add()
def meta_generate(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Meta-attention with scheduled meta-tokens, by `generate`."""
    return _by_generate(_build(settings, prompts), prompts, prompts.schedule)


@GENERATION.add()
def plain_static(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Plain model, by `generate` with a static cache, whose steps transformers compiles on a GPU."""
    model = _build(settings, prompts, meta_attention_layers="none")
    return _by_generate(model, prompts, NoSchedule(), cache_implementation="static")


@GENERATION.add()
def meta_static(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """Meta-attention with scheduled meta-tokens, by `generate` with a static cache."""
    return _by_generate(_build(settings, prompts), prompts, prompts.schedule, cache_implementation="static")


@GENERATION.add()
def gpt2_generate(settings: GenerationBench, prompts: Prompts) -> Continuation:
    """GPT-2 of transformers, by its `generate`."""
    torch.manual_seed(0)
    config = GPT2Config(
        bos_token_id=None,
        eos_token_id=None,
        vocab_size=settings.vocabulary,
        n_positions=prompts.length,
        n_embd=settings.hidden_size,
        n_layer=settings.num_hidden_layers,
        n_head=settings.num_attention_heads,
    )
    return _by_generate(prepare(GPT2LMHeadModel(config), settings), prompts, None)


def _build(settings: GenerationBench, prompts: Prompts, **changes: Any) -> MetaTokenForCausalLM:
    config = ModelConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=prompts.length,
        position_encoding="learned",
        **changes,
    )
    vocabulary = settings.vocabulary
    model = build_model(config, text_vocab_size=vocabulary, eos_token_id=vocabulary - 1, seed=0)
    prepared: MetaTokenForCausalLM = prepare(model, settings)
    return prepared


def prepare(model: Any, settings: ModelBench) -> Any:
    """Set backend, device and precision, and let nothing end the text."""
    model.set_attn_implementation(settings.attention)
    # no end of text, so that all write as much
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(settings.device, torch.bfloat16 if settings.precision == "bfloat16" else torch.float32).eval()


def _by_steps(model: MetaTokenForCausalLM, prompts: Prompts, schedule: MetaSchedule) -> Continuation:
    meta_token_id = model.config.meta_token_id
    assert meta_token_id is not None
    suppressed = _not_text(model)
    end_of_text, *_ = suppressed
    prompt_ids = [schedule_meta_tokens(row, schedule, meta_token_id=meta_token_id) for row in prompts.rows]
    sampler = stepping.Sampler(temperature=0, top_k=None, top_p=None, suppressed=suppressed, device=model.device)

    def run(clock: Clock) -> None:
        wanted = [
            stepping.Continuation(ids, prompts.num_new, sampler, partial(clock.write_one, row))
            for row, ids in enumerate(prompt_ids)
        ]
        stepping.decode_together(model, wanted, schedule=schedule, eos_token_id=end_of_text)

    return Continuation(model, run, schedule, knows_prompt=True)


def _by_generate(model: Any, prompts: Prompts, schedule: MetaSchedule | None, **options: Any) -> Continuation:
    longest = max(map(len, prompts.rows))
    padding = [longest - len(row) for row in prompts.rows]
    ids = [[0] * num_padding + row for num_padding, row in zip(padding, prompts.rows, strict=True)]
    mask = [[0] * num_padding + [1] * len(row) for num_padding, row in zip(padding, prompts.rows, strict=True)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if schedule is not None:
        options |= {"meta_schedule": schedule, "suppress_tokens": _not_text(model)}

    def run(clock: Clock) -> None:
        model.generate(**inputs, max_new_tokens=prompts.num_new, do_sample=False, streamer=clock, **options)

    return Continuation(model, run, schedule or NoSchedule())


def _not_text(model: MetaTokenForCausalLM) -> list[int]:
    """Return the ids that no text tokenizer owns, which `generate_text` suppresses, and the end of text."""
    return [model.config.eos_token_id, *range(model.config.meta_token_id or 0, model.config.vocab_size)]
