"""Contenders of the data pipeline do the same work, and those of analysis see the same rows."""

import json
from pathlib import Path

import pytest

from commands import metatokens
from metatokens.bench.analysis import make_ids, make_look
from metatokens.bench.analysis_contenders import ANALYSIS
from metatokens.config.bench import AnalysisBench

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocabulary": 100, "length": 64}
QUICK = ["--rounds", "1", "--warmup", "0", "--json"]


def test_all_ways_of_analysis_see_the_same_entropy_of_every_row() -> None:
    settings = AnalysisBench(**SHAPE)
    ids = make_ids(settings)
    assert ids.shape == (1, 64)
    assert int((ids == 100).sum()) == 6
    # 64 queries are fewer than the sample, so `sampled` looks at all of them
    found = {name: make_look(settings, name)(ids) for name in ANALYSIS}
    assert found.pop("forward") is None
    assert found["sampled"] == pytest.approx(found["stored"], rel=1e-5)
    assert found["blocks"] == pytest.approx(found["stored"], rel=1e-5)


def test_analysis_is_measured_beside_the_forward_pass() -> None:
    flags = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    result = json.loads(metatokens("bench", "analysis", *flags, *QUICK).stdout)
    assert {(one["above"], one["below"]) for one in result["ratios"]} == {
        (name, "forward") for name in ANALYSIS if name != "forward"
    }
    assert all(line["positions"] == 64 and line["text_tokens"] == 58 for line in result["lines"])
    assert result["facts"]["stored"]["mean_entropy_nats"] > 0


def test_the_data_pipeline_is_measured_on_a_text_of_the_user(tmp_path: Path) -> None:
    text = "".join(f"Line {line} says that {line * line} is the square of {line}.\n" for line in range(3000))
    (tmp_path / "text.txt").write_text(text)
    words = ["--text", str(tmp_path / "text.txt"), "--length", "32", "--rows", "4"]
    result = json.loads(metatokens("bench", "data", *words, *QUICK).stdout)
    lines = {line["contender"]: line for line in result["lines"]}
    assert lines.keys() == {"tokenise", "tokenizers", "prepare_text", "inject", "loader"}
    # both encoders find the same tokens, and what is written holds an end of text more
    assert lines["tokenise"]["text_tokens"] == lines["tokenizers"]["text_tokens"] > 1000
    assert lines["prepare_text"]["text_tokens"] == lines["tokenise"]["text_tokens"] + 1
    assert result["facts"]["tokenise"]["text_bytes"] == len(text)
    for name in ("inject", "loader"):
        assert (lines[name]["positions"], lines[name]["text_tokens"]) == (20 * 4 * 32, 20 * 4 * 29)
