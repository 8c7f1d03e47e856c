"""Statistics of attention rows equal a dense float64 softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from lens_models import META, attention_call, build
from metatokens.analysis.attention.rows import RowStatistics, StratifiedQueries, observe_attention, row_statistics
from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import NoPositionEdges, intervene
from metatokens.lens import Lens
from metatokens.lens.activations import BLOCK_SCORES
from tolerances import tolerance
from watched import LiveBytes

SIZES = (1, 2, 63, 64, 65, 257)
NAMES = ("entropy", "meta_mass", "meta_log_odds", "sink_mass", "max_score")


def statistics_of(
    query: Tensor,
    key: Tensor,
    is_meta: Tensor,
    scaling: float = 0.25,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> RowStatistics:
    return row_statistics(attention_call(query, key, scaling=scaling, mask=mask), is_meta=is_meta, rows=rows)


def statistics_of_model(lens: Lens, ids: Tensor, is_meta: Tensor, rows: Tensor | None = None) -> list[RowStatistics]:
    found: list[RowStatistics] = []
    observe_attention(lens, ids, lambda call: found.append(row_statistics(call, is_meta=is_meta, rows=rows)))
    return found


def draw(tokens: int, scale: float, *, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, heads, tokens, 16, generator=generator) * scale**0.5 for _ in range(2))
    return query, key + torch.randn(16, generator=generator), torch.rand(2, tokens, generator=generator) < 0.3


def dense(query: Tensor, key: Tensor, is_meta: Tensor, scaling: float, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The definitions, with every weight written out in float64."""
    tokens = query.shape[-2]
    scores = query.double() @ key.double().transpose(-1, -2) * scaling
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen, scores = seen & (mask > -1e30), scores + mask
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    meta = is_meta[:, None, None, :] & seen
    on_meta, on_text = torch.where(meta, weights, 0), torch.where(meta, 0, weights)
    mass, rest = on_meta.sum(-1), on_text.sum(-1)
    return {
        "entropy": torch.special.entr(weights).sum(-1),
        "meta_mass": mass,
        "meta_log_odds": mass.log() - rest.log(),
        "max_score": scores.amax(-1),
        "sink_mass": weights.gather(-1, seen.int().argmax(-1, keepdim=True).expand(*scores.shape[:3], 1))[..., 0],
    }


def rounding(query: Tensor, key: Tensor, scaling: float) -> float:
    """Bound what float32 leaves open: a score adds D products, and a statistic as many terms as a row has keys."""
    tokens, width = query.shape[-2:]
    largest = float((query.double().abs() @ key.double().abs().transpose(-1, -2)).max()) * scaling
    return tolerance(torch.float32, width) * largest + tolerance(torch.float32, tokens) * max(1.0, math.log(tokens))


def assert_same(found: RowStatistics, expected: dict[str, Tensor], atol: float) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            getattr(found, name).double(),
            expected[name],
            rtol=atol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("tokens", SIZES)
def test_statistics_equal_the_dense_softmax(tokens: int, scale: float) -> None:
    query, key, is_meta = draw(tokens, scale)
    expected = dense(query, key, is_meta, 0.25)
    assert_same(statistics_of(query, key, is_meta), expected, rounding(query, key, 0.25))
    assert_same(statistics_of(query.double(), key.double(), is_meta), expected, 1e-10)


@pytest.mark.parametrize("shift", [-40.0, 40.0])
def test_a_set_of_next_to_no_weight_is_as_exact_as_the_other(shift: float) -> None:
    """Of 1 - P of the order of e^-40, float32 knows nothing; the log-odds and the entropy do."""
    query, key, is_meta = draw(200, 2.0)
    query[..., 0], key[..., 0] = 1.0, torch.where(is_meta, 4 * shift, 0.0)[:, None]
    expected = dense(query, key, is_meta, 0.25)
    found = statistics_of(query, key, is_meta)
    for name in ("entropy", "meta_log_odds"):
        torch.testing.assert_close(
            getattr(found, name).double(), expected[name], rtol=1e-4, atol=rounding(query, key, 0.25), equal_nan=True
        )


def test_extreme_scores_stay_exact() -> None:
    query, key, is_meta = draw(65, 300.0)
    expected = dense(query, key, is_meta, 1.0)
    found = statistics_of(query, key, is_meta, 1.0)
    assert torch.allclose(found.entropy.double(), expected["entropy"], atol=1e-3)
    assert (found.entropy >= 0).all()


def test_uniform_rows_have_the_logarithm_of_their_keys_and_one_hot_rows_none() -> None:
    key = torch.ones(1, 1, 9, 4)
    uniform = statistics_of(torch.ones(1, 1, 9, 4), key, torch.zeros(1, 9, dtype=torch.bool), 1.0)
    assert torch.allclose(uniform.entropy[0, 0], torch.arange(1, 10).float().log(), atol=1e-6)
    assert torch.allclose(
        uniform.effective_keys[0, 0], torch.arange(1, 10).float(), rtol=tolerance(torch.float32, 2 * 9)
    )
    assert torch.allclose(uniform.entropy_without_sink[0, 0, 1:], torch.arange(1, 9).float().log(), atol=1e-5)
    identity = torch.eye(9)[None, None]
    one_hot = statistics_of(identity * 1e3, identity, torch.ones(1, 9, dtype=torch.bool), 1.0)
    assert torch.equal(one_hot.entropy, torch.zeros(1, 1, 9))
    assert torch.equal(one_hot.meta_lift, torch.ones(1, 1, 9))


@pytest.mark.parametrize("kind", ["padding", "documents", "additive"])
def test_hidden_keys_do_not_count(kind: str) -> None:
    query, key, is_meta = draw(40, 2.0)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    if kind == "documents":
        document = torch.arange(40) // 13
        mask &= document[:, None] == document
    else:
        mask[1, :, 5:, :5] = False
    given_mask: Tensor = mask if kind != "additive" else torch.where(mask, 0.5, torch.finfo(torch.float32).min)
    found = statistics_of(query, key, is_meta, mask=given_mask)
    assert_same(found, dense(query, key, is_meta, 0.25, given_mask), rounding(query, key, 0.25))
    assert torch.equal(found.num_keys[:, 0], (mask & torch.ones(40, 40, dtype=torch.bool).tril()).sum(-1)[:, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), tokens=st.integers(2, 40))
def test_entropy_knows_neither_the_order_of_keys_nor_a_constant(seed: int, shift: float, tokens: int) -> None:
    query, key, is_meta = draw(tokens, 3.0, seed=seed)
    last = torch.tensor([tokens - 1])
    plain = statistics_of(query, key, is_meta, rows=last)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    permuted = statistics_of(query, key[:, :, order], is_meta[:, order], rows=last)
    bias = torch.full((1, 1, tokens, tokens), shift)
    shifted = statistics_of(query, key, is_meta, rows=last, mask=bias)
    for other in (permuted, shifted):
        for name in ("entropy", "meta_log_odds"):
            torch.testing.assert_close(getattr(other, name), getattr(plain, name), rtol=1e-3, atol=1e-4, equal_nan=True)


def test_rows_are_those_asked_for_one_of_each_stretch() -> None:
    query, key, is_meta = draw(300, 4.0)
    rows = StratifiedQueries(count=50, seed=3).draw(300)
    assert len(rows) == 50
    assert torch.equal(rows // 6, torch.arange(50))
    found = statistics_of(query, key, is_meta, rows=rows)
    whole = statistics_of(query, key, is_meta)
    assert torch.allclose(found.entropy, whole.entropy[..., rows], atol=rounding(query, key, 0.25))


def test_rows_taken_in_several_blocks_are_the_same_rows() -> None:
    tokens = 2200  # more scores than a block of rows holds
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, tokens, 8, generator=generator) * 2 for _ in range(2))
    is_meta = torch.rand(1, tokens, generator=generator) < 0.1
    assert tokens**2 > BLOCK_SCORES
    expected = dense(query, key, is_meta, 0.25)
    assert_same(statistics_of(query.double(), key.double(), is_meta), expected, 1e-10)


def test_rows_that_see_nothing_have_no_statistics() -> None:
    query, key, is_meta = draw(9, 2.0)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :3] = False
    found = statistics_of(query, key, is_meta, mask=mask)
    assert torch.equal(found.num_keys[1, 0, :4], torch.tensor([0, 0, 0, 4]))
    for name in ("entropy", "meta_mass", "meta_log_odds", "sink_mass"):
        assert getattr(found, name)[1, :, :3].isnan().all(), name
    assert found.meta_lift[1, :, :3].isnan().all()
    assert found.entropy[1, :, 3:].isfinite().all()


@pytest.mark.parametrize("position_encoding", ["rope", "learned", "alibi"])
def test_statistics_of_a_model_are_those_of_its_eager_weights(position_encoding: str) -> None:
    model = build(num_hidden_layers=2, position_encoding=position_encoding, attn_implementation="sdpa")
    ids = torch.randint(0, META, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 5, 9]] = ids[1, [4, 11]] = META
    rows = StratifiedQueries(8).draw(20)
    found = statistics_of_model(Lens(model), ids, ids == META)
    sampled = statistics_of_model(Lens(model), ids, ids == META, rows)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids, output_attentions=True)
    for layer in range(2):
        weights = output.attentions[layer].double()
        entropy = torch.special.entr(weights).sum(-1)
        torch.testing.assert_close(found[layer].entropy.double(), entropy, rtol=1e-4, atol=1e-4)
        mass = (weights * (ids == META)[:, None, None]).sum(-1)
        torch.testing.assert_close(found[layer].meta_mass.double(), mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sampled[layer].entropy.double(), entropy[..., rows], rtol=1e-4, atol=1e-4)


def test_local_layers_of_gpt_neo_see_their_window_alone() -> None:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    model = GPTNeoForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    found = statistics_of_model(Lens(model), ids, ids < 10)
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for layer in range(2):
        entropy = torch.special.entr(weights[layer].double()).sum(-1)
        torch.testing.assert_close(found[layer].entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    assert int(found[0].num_keys.max()) == 20
    assert int(found[1].num_keys.max()) == 4


def test_a_model_without_meta_tokens_in_sight_is_measured_under_unrotated_edges() -> None:
    """The keys of `no_position_edges` are wider than its queries while no meta-token has come."""
    model = build(num_hidden_layers=2, position_encoding="rope", attn_implementation="sdpa")
    ids = torch.randint(0, META, (1, 12), generator=torch.Generator().manual_seed(1))
    lens, is_meta = Lens(model), torch.zeros(1, 12, dtype=torch.bool)
    plain = statistics_of_model(lens, ids, is_meta)
    with intervene(model, [NoPositionEdges()]):
        wide: list[RowStatistics] = []
        with lens.observe(lambda call: wide.append(row_statistics(call, is_meta=is_meta))):
            lens(ids, use_cache=True)
    torch.testing.assert_close(wide[1].entropy, plain[1].entropy)


def test_a_grouped_softmax_is_refused() -> None:
    config = LandmarkConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        meta_token_id=META,
        meta_attention_layers="none",
    )
    lens = Lens(LandmarkForCausalLM(config).eval())
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(UsageError, match="grouped softmax"):
        statistics_of_model(lens, ids, ids == META)


@torch.no_grad()
def test_four_thousand_tokens_need_no_square_array() -> None:
    query, key = torch.randn(2, 1, 8, 4096, 4)
    with LiveBytes() as live:
        row_statistics(attention_call(query, key, scaling=0.5), is_meta=torch.rand(1, 4096) < 0.1)
    assert live.peak < 4096**2 * 4  # the weights of one head of eight


def test_a_backend_whose_masks_cannot_be_read_is_refused() -> None:
    query, key, is_meta = draw(4, 1.0)
    with pytest.raises(UsageError, match="eager or sdpa, whose masks can be read, found object"):
        statistics_of(query, key, is_meta, mask=object())  # type: ignore[arg-type]
