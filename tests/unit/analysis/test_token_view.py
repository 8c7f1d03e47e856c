"""What a page shows of a text is what the model computed, to the precision that the module states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from metatokens.analysis.attention.rows import observe_attention, row_statistics
from metatokens.analysis.representations.similarity import Calibration, calibrate
from metatokens.analysis.results import Results, read_results, write_results
from metatokens.analysis.token_view import (
    DENSE_VIEW,
    LONGEST_VIEW,
    SPARSE_HEADS,
    SPARSE_KEYS,
    attribute_tokens,
    declare_view,
    measure_token_view,
    quantize_weights,
    token_losses,
)
from metatokens.errors import UsageError
from metatokens.lens import Lens
from metatokens.lens.hooks import UNREADABLE
from metatokens.lens.residuals import capture_residuals
from tiny_models import ENCODINGS, META, randomize, tiny_model, tokens

PICTURE = "xx_xxx_xxxx_xx"
PRECISION = 0.004


def decode(ids: list[int]) -> str:
    return "".join("_" if token_id == META else f" t{token_id}" for token_id in ids)


def picture(text: str = PICTURE) -> Tensor:
    return tokens(text)[0]


def weights_of(steps: np.ndarray) -> np.ndarray:
    return (steps / 255.0) ** 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", [one for one in ENCODINGS if one not in UNREADABLE])
def test_attention_is_the_models_own(encoding: str, implementation: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=implementation)
    ids = picture()
    view = measure_token_view(Lens(model), ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids[None], output_attentions=True, output_meta_attentions=True)
    for layer in range(2):
        attention = output.attentions[layer][0].numpy()
        np.testing.assert_allclose(weights_of(view["attention"][layer]), attention, atol=PRECISION)
        meta_attention = output.meta_attentions[layer][0].numpy()
        np.testing.assert_allclose(weights_of(view["meta_attention"][layer]), meta_attention, atol=PRECISION)
        for key in range(len(ids)):
            expected = attention[:, key:, key].mean(1)
            np.testing.assert_allclose(view["received_attention"][layer][:, key], expected, atol=1e-5)
    assert view["attention"].shape == (2, 4, 14, 14)
    assert view["meta_attention_tokens"].tolist() == [2, 6, 11]
    assert (np.triu(view["attention"], 1) == 0).all()


def test_tokens_are_decoded_one_by_one_and_meta_tokens_named() -> None:
    ids = picture()
    view, arrays = declare_view(Lens(tiny_model()), ids, {"logit": np.zeros(14)}, decode, title="A text", key="view3")
    assert view.is_meta == tuple(character == "_" for character in PICTURE)
    assert view.tokens[2] == "_"
    assert view.tokens[0] == f" t{int(ids[0])}"
    assert view.arrays == {"logit": "view3.logit"}
    assert arrays.keys() == {"view3.logit"}


def test_losses_are_those_of_the_text_with_and_without_its_meta_tokens() -> None:
    model = tiny_model()
    ids = picture("_xx_xxx_xx")
    view = measure_token_view(Lens(model), ids)
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        text_log_p = model(ids[ids != META][None]).logits[0].log_softmax(-1)
    text = [position for position in range(10) if ids[position] != META]
    for ordinal, position in enumerate(text):
        loss, without = view["loss_with"][position], view["loss_without"][position]
        assert loss == pytest.approx(-float(log_p[position - 1, ids[position]]), abs=1e-5)
        if ordinal:
            assert without == pytest.approx(-float(text_log_p[ordinal - 1, ids[position]]), abs=1e-5)
    meta = (ids == META).numpy()
    assert np.isnan(view["loss_with"][meta]).all()
    assert np.isnan(view["loss_without"][meta]).all()
    assert np.isnan(view["loss_without"][1])  # no token stands before the first


@pytest.mark.parametrize("policy", ["skip", "retarget"])
def test_mean_of_the_losses_is_the_models_loss(policy: str) -> None:
    model = tiny_model(loss_policy=policy)
    ids = picture("_x_xx__xxx_x")
    view = measure_token_view(Lens(model), ids)
    with torch.no_grad():
        loss = float(model(ids[None], labels=ids[None]).loss)
    assert np.nanmean(view["loss_with"]) == pytest.approx(loss, abs=1e-5)


def test_retargeted_loss_is_read_at_the_last_text_token() -> None:
    log_p = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ids, is_meta = torch.tensor([1, 5, 5, 2]), torch.tensor([False, True, True, False])
    losses = token_losses(log_p, ids, is_meta, "retarget")
    assert losses[3] == pytest.approx(-float(log_p[0, 2]))
    assert np.isnan(losses[:3]).all()
    assert token_losses(log_p, ids, is_meta, "skip")[3] == pytest.approx(-float(log_p[2, 2]))


def test_cosines_are_those_of_the_states_after_each_block() -> None:
    lens = Lens(tiny_model())
    ids = picture()
    calibrations = calibrate(lens, [tokens("xx_xxx_x", seed=4)])
    view = measure_token_view(lens, ids, calibrations=calibrations)
    states = capture_residuals(lens, ids[None])
    for layer in range(2):
        after = states[layer + 1][0]
        for name, moved in (("cosine_raw", after), ("cosine_centred", after - calibrations[layer + 1].mean.float())):
            expected = torch.cosine_similarity(moved[:, None], moved[None], dim=-1).tril()
            np.testing.assert_allclose(view[name][layer] / 127, expected.numpy(), atol=PRECISION)
    assert np.abs(view["cosine_raw"].astype(int) - view["cosine_centred"]).max() > 5
    assert "cosine_centred" not in measure_token_view(lens, ids)
    assert isinstance(calibrations[0], Calibration)


def test_rounding_keeps_weights_within_the_stated_precision() -> None:
    weights = torch.linspace(0, 1, 100_001)
    errors = np.abs(weights_of(quantize_weights(weights)) - weights.numpy())
    assert 0.003 < errors.max() < PRECISION


def test_layer_without_meta_attention_is_zero() -> None:
    view = measure_token_view(Lens(tiny_model(meta_attention_layers=[1])), picture())
    assert (view["meta_attention"][0] == 0).all()
    assert (view["meta_attention"][1].max(-1) > 0).all()


def test_text_without_meta_tokens_has_no_meta_attention_and_one_loss() -> None:
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    models: list[Any] = [tiny_model(), randomize(GPT2LMHeadModel(config)).eval()]
    for model in models:
        view = measure_token_view(Lens(model), picture("xxxxxx"))
        assert not {"meta_attention", "meta_attention_tokens"} & view.keys()
        np.testing.assert_array_equal(view["loss_with"], view["loss_without"])
        np.testing.assert_allclose(weights_of(view["attention"]).sum(-1), 1, atol=0.02)


def test_what_is_no_window_of_text_is_refused() -> None:
    lens = Lens(tiny_model())
    for ids in (torch.zeros(LONGEST_VIEW + 1, dtype=torch.long), picture()[None], picture("____"), picture()[:0]):
        with pytest.raises(UsageError, match="at most 2048"):
            measure_token_view(lens, ids)
    with pytest.raises(ValueError, match=r"an array \(3, 14\), not \(2, 14\)"):
        measure_token_view(lens, picture(), patch_effect=np.zeros((2, 14)))


# direct attribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "retarget"])
def test_parts_of_a_logit_add_up_to_it_over_the_mean_of_the_vocabulary(policy: str) -> None:
    model = tiny_model(loss_policy=policy)
    ids = picture("_x_xx__xxx_x")
    lens = Lens(model)
    parts = attribute_tokens(lens, ids)
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    over_mean = logits - logits.mean(-1, keepdim=True)
    is_meta = (ids == META).tolist()
    last_text = None
    for position in range(len(ids)):
        before = position - 1 if policy == "skip" else last_text
        if is_meta[position]:
            assert all(np.isnan(column[position]) for column in parts.values())
            continue
        last_text = position
        if before is None:
            assert np.isnan(parts["logit"][position])
            continue
        expected = float(over_mean[before, ids[position]])
        assert parts["logit"][position] == pytest.approx(expected, abs=1e-4)
        total = sum(float(column[position]) for name, column in parts.items() if name != "logit")
        assert total == pytest.approx(expected, abs=1e-4)
    view = measure_token_view(lens, ids)
    for name, branch in (("attention", "attn_out"), ("meta_attention", "meta_out"), ("mlp", "mlp_out")):
        assert view[f"logit_{name}"].shape == (2, 12)
        for layer in range(2):
            np.testing.assert_array_equal(view[f"logit_{name}"][layer], parts[f"blocks.{layer}.{branch}"])
    np.testing.assert_array_equal(view["logit"], parts["logit"])
    np.testing.assert_array_equal(np.isnan(view["logit"]), np.isnan(view["loss_with"]))


def test_layer_without_meta_attention_adds_nothing_and_a_text_without_meta_tokens_has_no_such_array() -> None:
    lens = Lens(tiny_model(meta_attention_layers=[1]))
    arrays = measure_token_view(lens, picture())
    known = ~np.isnan(arrays["logit"])
    assert (arrays["logit_meta_attention"][0, known] == 0).all()
    assert (arrays["logit_meta_attention"][1, known] != 0).any()
    assert "logit_meta_attention" not in measure_token_view(lens, picture("xxxxxx"))
    assert np.isnan(measure_token_view(lens, picture("x"))["logit"]).all()


def test_patch_effect_is_kept_as_it_is() -> None:
    effect = np.linspace(-0.5, 1, 42).reshape(3, 14)
    arrays = measure_token_view(Lens(tiny_model()), picture(), patch_effect=effect)
    np.testing.assert_allclose(arrays["patch_effect"], effect, atol=1e-7)
    assert arrays["patch_effect"].dtype == np.float32


# long texts ------------------------------------------------------------------------------------------------------


def long_text(num_tokens: int, meta_every: int) -> Tensor:
    ids = torch.randint(0, 19, (num_tokens,), generator=torch.Generator().manual_seed(3))
    ids[meta_every - 1 :: meta_every] = META
    return ids


def test_long_text_keeps_the_largest_weights_of_the_heads_that_care_most_for_meta_tokens() -> None:
    model = tiny_model(max_position_embeddings=300, num_attention_heads=16, hidden_size=64)
    lens, ids = Lens(model), long_text(DENSE_VIEW + 24, 10)
    arrays = measure_token_view(lens, ids)
    assert not {"attention", "cosine_raw", "cosine_centred"} & arrays.keys()
    assert arrays["meta_attention"].shape == (2, 16, 28, 28)
    assert arrays["attention_keys"].shape == (2, 1 + SPARSE_HEADS, len(ids), SPARSE_KEYS)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True).attentions
    statistics = []
    observe_attention(
        lens, ids[None], lambda call: statistics.append(row_statistics(call, is_meta=(ids == META)[None]))
    )
    for layer in range(2):
        attention = attentions[layer][0]
        log_odds = statistics[layer].meta_log_odds[0, :, 9:]
        mean = torch.where(log_odds.isfinite(), log_odds, torch.nan).nanmean(-1).abs()
        heads = arrays["attention_heads"][layer].tolist()
        assert heads == sorted(mean.argsort(descending=True)[:SPARSE_HEADS].tolist())
        for plane, expected in enumerate([attention.mean(0), *attention[heads]]):
            keys = torch.from_numpy(arrays["attention_keys"][layer, plane].astype(np.int64))
            kept = weights_of(arrays["attention_weights"][layer, plane])
            np.testing.assert_allclose(kept, expected.gather(1, keys).numpy(), atol=PRECISION)
            left_out = expected.scatter(1, keys, 0)
            assert (left_out.max(1).values.numpy() <= kept.min(1) + PRECISION).all()
            assert (kept[:SPARSE_KEYS].astype(bool).sum(1) <= np.arange(1, SPARSE_KEYS + 1)).all()
        num_queries = np.arange(len(ids), 0, -1)
        received = attention.sum(1).numpy() / num_queries
        np.testing.assert_allclose(arrays["received_attention"][layer], received, atol=1e-5)
    with torch.no_grad():
        loss = float(model(ids[None], labels=ids[None]).loss)
    assert np.nanmean(arrays["loss_with"]) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("encoding", ["alibi", "learned"])
def test_long_text_with_many_meta_tokens_has_no_meta_attention_and_one_without_them_the_first_heads(
    encoding: str,
) -> None:
    lens = Lens(tiny_model(max_position_embeddings=600, position_encoding=encoding))
    arrays = measure_token_view(lens, long_text(2 * (DENSE_VIEW + 2), 2))
    assert not {"meta_attention", "meta_attention_tokens"} & arrays.keys()
    assert arrays["attention_heads"].tolist() == [[0, 1, 2, 3]] * 2
    total = weights_of(arrays["attention_weights"][:, :, :SPARSE_KEYS]).sum(-1)
    np.testing.assert_allclose(total, 1, atol=0.05)
    plain = measure_token_view(lens, long_text(DENSE_VIEW + 1, 999))
    assert plain["attention_heads"].tolist() == [[0, 1, 2, 3]] * 2


def test_view_goes_through_the_files_of_the_results(tmp_path: Path) -> None:
    lens = Lens(tiny_model())
    measured = measure_token_view(lens, picture())
    view, arrays = declare_view(lens, picture(), measured, decode, title="A text", key="view0")
    results = Results(
        title="t",
        checkpoint={},
        config={},
        config_sha256="",
        endpoints_sha256="",
        data={},
        seed=0,
        versions={},
        command="",
        records=(),
        token_views=(view,),
    )
    write_results(tmp_path, results, arrays)
    read, read_arrays = read_results(tmp_path)
    assert read.token_views[0].tokens == view.tokens
    for name, key in read.token_views[0].arrays.items():
        np.testing.assert_array_equal(read_arrays[key], measured[name])
