"""Contenders of long texts write what one pass over the whole says, and their caches have the bytes of the formula."""

import json
from pathlib import Path

import pytest
import torch

from commands import metatokens
from metatokens.bench.long import contend
from metatokens.bench.long_contenders import LONG, Writer, make_plan
from metatokens.config.bench import LongBench

VOCABULARY = 50
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocabulary": VOCABULARY,
    "length": 195,
    "new": 10,
    "window": 16,
    "rounds": 2,
    "warmup": 0,
}
SETTINGS = LongBench(**TINY, chunks=(70,))


@pytest.mark.parametrize("name", LONG)
@torch.no_grad()
def test_each_writes_the_likeliest_tokens_of_one_pass_without_a_cache(name: str) -> None:
    reader = LONG[name](SETTINGS)
    reader.model.double()  # no two logits are as near as rounding
    writer = Writer(reader, make_plan(SETTINGS), 70)
    for _ in range(2):
        writer.write()
    ids = writer.ids
    assert ids.shape == (1, 240)  # 200 of the text, two turns of two periods
    assert torch.equal((ids[0] == VOCABULARY).nonzero()[:, 0], torch.arange(9, 240, 10))
    likeliest = reader.model(ids, use_cache=False).logits[0, 199:-1, :VOCABULARY].argmax(-1)
    is_text = ids[0, 200:] != VOCABULARY
    assert torch.equal(ids[0, 200:][is_text], likeliest[is_text])


@pytest.mark.parametrize("name", [name for name in LONG if name != "static_pause"])
def test_bytes_of_the_cache_are_those_of_the_formula(name: str) -> None:
    facts = contend(Writer(LONG[name](SETTINGS), make_plan(SETTINGS), 70)).facts
    of_text = 4 + 16 + 20 if "memory" in name else 200
    columns = of_text + (0 if "pause" in name else 20)
    assert facts["cache_bytes"] == facts["formula_bytes"] == 2 * 2 * 32 * 4 * columns


@pytest.mark.long
@pytest.mark.slow  # starts a process for each prefill
def test_the_command_compares_decoding_in_turns_and_prefill_in_processes(tmp_path: Path) -> None:
    out, plot = tmp_path / "long.json", tmp_path / "long.png"
    words = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    words += ["--contenders", "[memory, full, static_pause]", "--chunks", "[100]"]
    shown = metatokens("bench", "long", *words, "--out", out, "--plot", plot).stdout
    assert "decode" in shown
    assert plot.stat().st_size > 0
    result = json.loads(out.read_text())
    assert [(line["contender"], line["part"], line["text_tokens"], line["positions"]) for line in result["lines"]] == [
        (name, "decode", 18, 20) for name in ("memory", "full", "static_pause")
    ]
    parts = {"decode", "prefill_100_seconds", "prefill_100_peak_bytes"}
    assert {one["part"] for one in result["ratios"] if (one["above"], one["below"]) == ("full", "memory")} == parts
    assert [one["part"] for one in result["ratios"] if one["above"] == "static_pause"] == ["decode"]
    for name in ("memory", "full"):
        assert {part: len(values) for part, values in result["rounds"][name].items()} == {
            part: 2 if part == "decode" else 1 for part in parts
        }
        assert result["facts"][name].keys() > parts - {"decode"}
