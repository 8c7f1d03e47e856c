"""Contenders of generation write what they should; their text, their caches and the limits of the result."""

import json
from pathlib import Path

import pytest

from commands import metatokens
from metatokens.bench.generation import cache_bytes, written_by
from metatokens.bench.generation_contenders import GENERATION, make_prompts
from metatokens.config.bench import GenerationBench
from metatokens.model.schedule import schedule_meta_tokens

LAYERS, WIDTH, VOCABULARY, PROMPT = 2, 32, 100, 40
TINY = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocabulary": VOCABULARY,
    "prompt": PROMPT,
    "new": 18,
}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("kind", ["plain", "meta"])
def test_all_loops_write_the_same_tokens(kind: str) -> None:
    settings = GenerationBench(**TINY)
    prompts = make_prompts(settings)
    written = []
    for loop in ("steps", "generate", "static"):
        continuation = GENERATION[f"{kind}_{loop}"](settings, prompts)
        continuation.model.double()  # no two logits are as near as rounding
        written.append(written_by(continuation))
    assert written[0] == written[1] == written[2]
    (row,) = written[0]
    assert len(row) == 20
    num_meta = row.count(VOCABULARY)
    # after 45 and 54 of the text's tokens; the prompt ended with the 40th
    assert num_meta == (2 if kind == "meta" else 0)


@pytest.mark.parametrize("name", ["meta_generate", "meta_steps"])
def test_rows_of_a_ragged_batch_write_what_each_writes_alone(name: str) -> None:
    settings = GenerationBench(**TINY, batch=3)
    prompts = make_prompts(settings)
    assert [len(row) for row in prompts.rows] == [13, 26, 40]
    together = GENERATION[name](settings, prompts)
    together.model.double()
    alone = [GENERATION[name](settings, prompts._replace(rows=[row])) for row in prompts.rows]
    for one in alone:
        one.model.double()
    assert written_by(together) == [row for one in alone for row in written_by(one)]


def test_bytes_of_a_cache_are_those_of_its_tokens_and_of_its_meta_tokens() -> None:
    settings = GenerationBench(**TINY)
    prompts = make_prompts(settings)
    model = GENERATION["meta_generate"](settings, prompts).model
    row = schedule_meta_tokens(prompts.rows[0], prompts.schedule, meta_token_id=VOCABULARY)
    num_meta = PROMPT // 9
    assert row.count(VOCABULARY) == num_meta
    per_token = LAYERS * 2 * WIDTH * 4
    expected = {"text_part_bytes": (PROMPT + num_meta) * per_token, "meta_part_bytes": num_meta * per_token}
    assert cache_bytes(model, [row]) == expected


def test_the_command_compares_decoding_with_the_bytes_of_the_weights(tmp_path: Path) -> None:
    out = tmp_path / "generation.json"
    metatokens("bench", "generation", *FLAGS, "--rounds", "2", "--warmup", "0", "--out", out)
    result = json.loads(out.read_text())
    lines = {(line["contender"], line["part"]): line for line in result["lines"]}
    assert {name for name, _ in lines} == set(GENERATION)
    rows = {True: VOCABULARY, False: 128}  # of the embedding, which this package pads
    block = 4 * WIDTH * (WIDTH + 1) + WIDTH * 4 * WIDTH * 2 + 4 * WIDTH + WIDTH + 2 * 2 * WIDTH
    for name in ("plain_steps", "plain_generate", "plain_static", "gpt2_generate"):
        line = lines[name, "decode"]
        assert (line["text_tokens"], line["positions"]) == (19, 19)
        weights = 4 * (rows[name == "gpt2_generate"] * WIDTH + LAYERS * block + 2 * WIDTH)
        expected = 19 * weights / result["rates"]["read"]["median"]
        assert line["limit_seconds"] == pytest.approx(expected, rel=1e-3)
    for name in ("meta_steps", "meta_generate", "meta_static"):
        assert (lines[name, "decode"]["text_tokens"], lines[name, "decode"]["positions"]) == (17, 19)
        assert (lines[name, "first token"]["text_tokens"], lines[name, "first token"]["positions"]) == (40, 44)
        assert lines[name, "decode"]["limit_seconds"] > lines["plain_steps", "decode"]["limit_seconds"] * 17 / 19
        assert result["facts"][name]["meta_part_bytes"] * 11 == result["facts"][name]["text_part_bytes"]


def test_a_batch_counts_as_much_text_in_steps_as_in_generate() -> None:
    words = [*FLAGS, "--batch", "2", "--rounds", "1", "--warmup", "0", "--contenders", "[plain_steps, plain_generate]"]
    result = json.loads(metatokens("bench", "generation", *words, "--json").stdout)
    counts = {(line["contender"], line["part"]): line["text_tokens"] for line in result["lines"]}
    assert counts["plain_steps", "decode"] == counts["plain_generate", "decode"] == 2 * 19


@pytest.mark.long
def test_peak_memory_is_that_of_a_process_that_holds_the_training_state() -> None:
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocabulary": 8000, "length": 64}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    words += ["--rounds", "1", "--contenders", "[plain, meta]"]
    result = json.loads(metatokens("bench", "memory", *words, "--json").stdout)
    parameters = 8000 * 256 + 4 * 12 * 256**2
    found = {name: facts["bytes_beyond"] for name, facts in result["facts"].items()}
    # weights, gradients and two moments, 16 bytes each, and less for activations than the same again
    assert 16 * parameters < found["plain"] < 32 * parameters
    assert found["plain"] < found["meta"]
    (ratio,) = result["ratios"]
    assert ratio["per_text_token"]["median"] == pytest.approx(found["meta"] / found["plain"], rel=1e-4)
