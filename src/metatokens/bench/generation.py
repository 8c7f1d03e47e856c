"""How fast is generation, with and without meta-tokens, and where is the limit?

Reading the prompt and decoding are timed apart: "first token" ends when each row has its first new text token, "decode"
is the rest. Decoding waits for memory: its limit is the rate of reading over the bytes of the weights, which each step
needs once. Weights of meta-attention count where a meta-token stands, and a meta-token itself needs no pass of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from metatokens.bench.generation_contenders import GENERATION, Clock, Continuation, Prompts, make_prompts
from metatokens.bench.measuring import BenchResult, Contender, Pair, Work, measure, quiet, set_threads
from metatokens.config.bench import GenerationBench
from metatokens.model.accounting import count_parameters, forward_flops
from metatokens.model.configuration import MetaTokenConfig
from metatokens.model.schedule import schedule_meta_tokens

REGISTRY = GENERATION
PAIRS = (
    Pair("meta_steps", "plain_steps"),
    Pair("meta_generate", "plain_generate"),
    Pair("meta_static", "plain_static"),
    Pair("meta_steps", "meta_generate"),
    Pair("plain_steps", "plain_generate"),
    Pair("plain_steps", "gpt2_generate"),
    Pair("plain_generate", "gpt2_generate"),
)
FIRST, REST = "first token", "decode"
_NO_TOKEN = -1


def run(settings: GenerationBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = GENERATION.choose(settings.contenders)
    set_threads(settings)
    prompts = make_prompts(settings)
    contenders = {}
    for name in names:
        say(f"building {name}")
        contenders[name] = contend(GENERATION[name](settings, prompts), prompts)
    return measure("generation", settings, GENERATION, contenders, pairs=PAIRS, not_run=not_run, say=say)


def contend(continuation: Continuation, prompts: Prompts) -> Contender:
    """Return the turn of a continuation, what its parts have to do, and the bytes of its cache."""
    meta_token_id = getattr(continuation.model.config, "meta_token_id", None)
    meta_token_id = _NO_TOKEN if meta_token_id is None else meta_token_id

    def write() -> Clock:
        clock = Clock(meta_token_id, knows_prompt=continuation.knows_prompt)
        continuation.run(clock)
        return clock

    def turn() -> Mapping[str, float]:
        clock = write()
        first = clock.steps[_first_text(clock, len(prompts.rows))][0]
        return {FIRST: first - clock.started, REST: clock.steps[-1][0] - first}

    rows = [schedule_meta_tokens(row, continuation.schedule, meta_token_id=meta_token_id) for row in prompts.rows]
    cache = cache_bytes(continuation.model, rows)
    return Contender(turn, _work(continuation.model, write(), prompts, rows, meta_token_id), cache)


def written_by(continuation: Continuation) -> list[list[int]]:
    """Return what a continuation writes, meta-tokens too: the tokens of each row."""
    clock = Clock(_NO_TOKEN, knows_prompt=continuation.knows_prompt)
    continuation.run(clock)
    rows: dict[int, list[int]] = {}
    for _, tokens in clock.steps:
        for row, token in tokens.items():
            rows.setdefault(row, []).append(token)
    return [rows[row] for row in sorted(rows)]


def cache_bytes(model: Any, rows: list[list[int]]) -> dict[str, int]:
    """Return the bytes of the keys and values of these prompts, each row alone: of all tokens, and of meta-tokens."""
    found = {"text_part_bytes": 0, "meta_part_bytes": 0}
    for row in rows:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            ids = torch.tensor([row], device=model.device)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for part, count in bytes_of_cache(cache).items():
            found[part] += count
    return found


def bytes_of_cache(cache: Any) -> dict[str, int]:
    """Return the bytes of the keys and values that a cache holds: of all tokens, and of meta-tokens."""
    found = {"text_part_bytes": 0, "meta_part_bytes": 0}
    for layer in cache.layers:
        found["text_part_bytes"] += layer.keys.nbytes + layer.values.nbytes
        if getattr(layer, "meta_keys", None) is not None:
            found["meta_part_bytes"] += layer.meta_keys.nbytes + layer.meta_values.nbytes
    return found


def _first_text(clock: Clock, num_rows: int) -> int:
    """Return the step after which every row has a text token."""
    waiting = set(range(num_rows))
    for index, (_, tokens) in enumerate(clock.steps):
        waiting -= clock.text_of(tokens).keys()
        if not waiting:
            return index
    raise AssertionError("a row got no text")


def _work(model: Any, clock: Clock, prompts: Prompts, rows: list[list[int]], meta_token_id: int) -> dict[str, Work]:
    config = model.config
    if not isinstance(config, MetaTokenConfig):  # GPT-2 of the same shape
        config = MetaTokenConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=4 * config.n_embd,
            meta_attention_layers="none",
        )
    num_meta = [row.count(meta_token_id) for row in rows]
    operations = sum(
        forward_flops(config, num_positions=len(row), num_meta=count, num_logits=1)
        for row, count in zip(rows, num_meta, strict=True)
    )
    reading = Work(text_tokens=sum(map(len, prompts.rows)), positions=sum(map(len, rows)), operations=operations)
    after = [tokens for _, tokens in clock.steps[_first_text(clock, len(rows)) + 1 :]]
    num_text = sum(len(clock.text_of(tokens)) for tokens in after)
    num_positions = sum(map(len, after))
    parameters, size = count_parameters(config), model.dtype.itemsize
    text_passes, meta_passes = num_text / len(rows), (num_positions - num_text) / len(rows)
    weights = size * (parameters.embedding + parameters.blocks)
    needed = text_passes * weights + meta_passes * size * parameters.meta_attention
    return {FIRST: reading, REST: Work(num_text, num_positions, read_bytes=needed)}
