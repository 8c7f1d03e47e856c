"""All contenders of a training step predict the same tokens; turns, limits and ratios are what the documents say."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import error_line, metatokens
from metatokens.bench.measuring import RATES
from metatokens.bench.sequences import Sequences, make_sequences
from metatokens.bench.training import PAIRS, build
from metatokens.bench.training_contenders import TRAINING, Candidate, Shape
from metatokens.bench.turns import Spread, ratio, take_turns
from metatokens.config.bench import TrainingBench
from metatokens.model.loss import IGNORE_INDEX
from tolerances import tolerance

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocabulary": 100, "length": 64, "rows": 2}
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
SETTINGS = TrainingBench(**TINY)
SHAPE = Shape(SETTINGS, SETTINGS.length)
INSTALLED, _ = TRAINING.choose(None)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return make_sequences(SETTINGS, SHAPE.meta_token_id)


def predicted(candidate: Candidate) -> list[int]:
    """Return the tokens that a contender predicts, in their order; transformers shifts labels itself."""
    inputs = candidate.inputs
    targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
    return [int(token) for token in targets.flatten() if token != IGNORE_INDEX]


@pytest.mark.parametrize("name", TRAINING)
def test_every_contender_predicts_the_same_tokens_and_learns_from_them(name: str, sequences: Sequences) -> None:
    if name not in INSTALLED:
        pytest.skip("x-transformers is not installed; the extra `bench` has it")
    num_text = sequences.text_ids.shape[1]
    candidate = build(name, SHAPE, sequences)
    assert predicted(candidate) == sequences.text_ids[:, 1:].flatten().tolist()
    loss = candidate.model(**candidate.inputs).loss
    loss.backward()
    # freshly drawn weights know nothing: about ln V nats a token, whatever the package
    vocabulary = candidate.config.vocab_size
    assert loss.item() == pytest.approx(torch.tensor(vocabulary).log().item(), abs=1)
    assert all(p.grad is not None for p in candidate.model.parameters() if p.requires_grad)
    hidden = candidate.decoder(**candidate.decoder_inputs).last_hidden_state
    assert hidden.shape == (2, num_text if name in ("plain_text", "x_memory") else 64, 32)


def test_packed_dense_and_fused_forms_are_one_function_of_the_same_weights(sequences: Sequences) -> None:
    losses, gradients = [], []
    for name in ("meta", "meta_indices", "dense", "dense_fused"):
        model: Any = build(name, SHAPE, sequences).model.double()
        loss = model(**TRAINING[name](SHAPE, sequences).inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.layers[0].meta_attn.q_proj.weight.grad)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=tolerance(torch.float64, 10_000), atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)


def test_turns_alternate_their_order_and_warmup_does_not_count() -> None:
    order: list[str] = []

    def turn(name: str, seconds: float) -> Any:
        def take() -> dict[str, float]:
            order.append(name)
            return {"whole": seconds * len(order)}

        return take

    rounds = take_turns({name: turn(name, 1.0) for name in "abc"}, rounds=2, warmup=1)
    assert "".join(order) == "abccbaabc"
    # the numbers of the turns that counted
    assert rounds == {"a": {"whole": [6, 7]}, "b": {"whole": [5, 8]}, "c": {"whole": [4, 9]}}
    assert ratio(rounds["a"]["whole"], rounds["b"]["whole"], scale=2) == Spread(
        pytest.approx(2.075), pytest.approx(1.9125), pytest.approx(2.2375)
    )


def test_the_command_keeps_every_round_and_compares_times_with_the_limits_of_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["plain", "plain_text", "meta"]
    out, plot = tmp_path / "benchmarks" / "results" / "tiny.json", tmp_path / "bench.png"
    words = [*FLAGS, "--rounds", "3", "--contenders", f"[{', '.join(names)}]", "--out", out, "--plot", plot, "--json"]
    done = metatokens("bench", "training", *words)
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert list(result["contenders"]) == names
    assert result["settings"]["length"] == 64
    assert RATES not in result["rounds"]
    lines = {(line["contender"], line["part"]): line for line in result["lines"]}
    assert len(lines) == 3 * 4
    rows, (num_text, num_meta) = 2, (58, 6)
    for (name, part), line in lines.items():
        seconds = result["rounds"][name][part]
        assert line["seconds"]["median"] == sorted(seconds)[1]
        assert line["text_tokens"] == rows * (num_text - 1)
        assert line["positions"] == rows * (num_text if name == "plain_text" else num_text + num_meta)
        assert line["share_of_limit"] == pytest.approx(line["limit_seconds"] / line["seconds"]["median"], rel=1e-4)
    # 6 operations a weight and position, and 6 a pair of causal attention and channel: two layers of width 32
    weights = 12 * 32**2
    expected = rows * 2 * (6 * weights * 64 + 3 * 4 * 32 * 64 * 65 // 2)
    limit = lines["plain", "decoder"]["limit_seconds"]
    assert limit == pytest.approx(expected / result["rates"]["matrix product"]["median"], rel=1e-4)
    found = {(one["above"], one["below"], one["part"]): one for one in result["ratios"]}
    assert {key[:2] for key in found} == {pair for pair in PAIRS if set(pair) <= set(names)}
    one = found["meta", "plain_text", "step"]
    times = zip(result["rounds"]["meta"]["step"], result["rounds"]["plain_text"]["step"], strict=True)
    median = sorted(above / below for above, below in times)[1]
    assert one["per_text_token"]["median"] == pytest.approx(median, rel=1e-4)
    assert one["per_position"]["median"] == pytest.approx(median * num_text / (num_text + num_meta), rel=1e-4)

    # the documents read it
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "docs")
    from measured import benchmarks, source

    monkeypatch.setattr(source, "ROOT", tmp_path)
    assert benchmarks.bench_ratio("tiny", "step", "meta", "plain_text")["estimate"] == one["per_text_token"]["median"]
    table = benchmarks.bench_table("tiny").splitlines()
    assert len(table) == 2 + len(result["ratios"])
    assert f"| meta / plain_text | step | {one['per_text_token']['median']:.3f} (" in benchmarks.bench_table("tiny")
    share = lines["plain", "step"]["share_of_limit"]
    assert benchmarks.bench_line("tiny", "plain", "step", "share_of_limit") == share


def test_a_dry_run_lists_the_contenders_and_an_unknown_one_gets_the_nearest() -> None:
    plan = json.loads(metatokens("bench", "training", *FLAGS, "--dry-run", "--json").stdout)
    assert list(plan["contenders"]) == INSTALLED
    assert "without meta-attention" in plan["contenders"]["pause"]
    assert "did you mean 'plain'?" in error_line("bench", "training", "--contenders", "[plian]", code=2)


@pytest.mark.skipif(find_spec("x_transformers") is not None, reason="x-transformers is installed")
def test_a_contender_whose_package_is_missing_is_left_out_and_refused_by_name() -> None:
    plan = json.loads(metatokens("bench", "training", *FLAGS, "--dry-run", "--json").stdout)
    assert plan["not_run"].keys() == {"x_rotary", "x_memory"}
    assert "metatokens[bench]" in error_line("bench", "training", "--contenders", "[x_rotary]", code=2)
