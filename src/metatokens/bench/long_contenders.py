"""The contenders of long texts: one function each, which says how a model attends and from what cache it decodes.

All have the same width, depth, heads and vocabulary, and read and write the same number of text tokens and meta-tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from metatokens.bench.generation_contenders import prepare
from metatokens.bench.measuring import Registry
from metatokens.config.attention import FullAttention, MemoryAttention
from metatokens.config.bench import LongBench
from metatokens.config.schema import ModelConfig
from metatokens.training.initialization import build_model

LONG = Registry()


class Plan(NamedTuple):
    """What is read and written, counted in periods: some text tokens and the meta-token behind them."""

    every: int
    """Text tokens of a period."""
    read: int
    """Periods to read."""
    written: int
    """Periods that a turn writes."""
    longest: int
    """Positions after the last turn."""


class Reader(NamedTuple):
    """A model, and how it decodes."""

    model: Any
    is_static: bool = False
    """From a cache of fixed size, which is written in place and not copied in each step."""


def make_plan(settings: LongBench) -> Plan:
    """Count the periods of the settings, rounded up."""
    every = max(1, round(1 / settings.ratio) - 1)
    read, written = -(-settings.length // (every + 1)), -(-settings.new // every)
    turns = settings.warmup + settings.rounds
    return Plan(every, read, written, (read + turns * written) * (every + 1))


@LONG.add()
def memory(settings: LongBench) -> Reader:
    """Memory mode: a window, sinks and the meta-tokens, with meta-attention."""
    return Reader(_build(settings, attention=_memory(settings)))


@LONG.add()
def memory_pause(settings: LongBench) -> Reader:
    """Memory mode without meta-attention."""
    return Reader(_build(settings, attention=_memory(settings), meta_attention_layers="none"))


@LONG.add()
def full(settings: LongBench) -> Reader:
    """Every token stays, with meta-attention."""
    return Reader(_build(settings, attention=FullAttention()))


@LONG.add()
def full_pause(settings: LongBench) -> Reader:
    """Every token stays, without meta-attention."""
    return Reader(_build(settings, attention=FullAttention(), meta_attention_layers="none"))


@LONG.add()
def static_pause(settings: LongBench) -> Reader:
    """Every token stays, without meta-attention, and decoding from a static cache."""
    return full_pause(settings)._replace(is_static=True)


class Writer:
    """A model behind a text that it has read."""

    def __init__(self, reader: Reader, plan: Plan, chunk: int) -> None:
        """Read the text in chunks."""
        self.model, self.plan = reader.model, plan
        self.vocabulary = self.model.config.meta_token_id
        self.ids = draw_text(plan, self.vocabulary).to(self.model.device)
        """(1, T) int64: all tokens so far, the one that was chosen last and not read left out."""
        self.cache, logits = read_in_chunks(self.model, self.ids, chunk)
        if reader.is_static:
            self.cache = _to_static(self.cache, self.model.config, plan.longest)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        self._next = logits[:, -1:, : self.vocabulary].argmax(-1)

    @torch.no_grad()
    def write(self) -> None:
        """Write the periods of a turn; a meta-token is read in the step of the text token before it."""
        meta = self._next.new_full((1, 1), self.vocabulary)
        for _ in range(self.plan.written):
            for place in range(self.plan.every):
                is_last = place == self.plan.every - 1
                new = torch.cat([self._next, meta], dim=1) if is_last else self._next
                output = self.model(new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                self.ids = torch.cat([self.ids, new], dim=1)
                self._choose(output.logits)


def draw_text(plan: Plan, vocabulary: int) -> Tensor:
    """Return (1, T) int64: random text with a meta-token, whose id is `vocabulary`, at the end of each period."""
    ids = torch.randint(vocabulary, (plan.read, plan.every + 1), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = vocabulary
    return ids.view(1, -1)


@torch.no_grad()
def read_in_chunks(model: Any, ids: Tensor, chunk: int) -> tuple[DynamicCache, Tensor]:
    """Read ids (1, T) some at a time; returns the cache and the logits (1, 1, V) of the last token."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits


def _to_static(cache: DynamicCache, config: Any, length: int) -> StaticCache:
    static = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, index)
    return static


def _memory(settings: LongBench) -> MemoryAttention:
    return MemoryAttention(anchors="meta", window=settings.window, num_sinks=settings.num_sinks)


def _build(settings: LongBench, **changes: Any) -> Any:
    config = ModelConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=make_plan(settings).longest,
        position_encoding="rope",
        **changes,
    )
    vocabulary = settings.vocabulary
    return prepare(build_model(config, text_vocab_size=vocabulary, eos_token_id=vocabulary - 1, seed=0), settings)
