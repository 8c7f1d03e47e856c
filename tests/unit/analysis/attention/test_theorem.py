"""The corrected sharpening theorem, held against autograd and against the logits themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metatokens.analysis.attention.theorem import KeyBoosts, audit_rows, critical_boost, margin_entropy


def draw_logits(seed: int, keys: int, scale: float) -> Tensor:
    return torch.randn(keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def entropy_of(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def margin_of(logits: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """x and N by their definitions."""
    others = torch.cat([logits[:key], logits[key + 1 :]])
    return logits[key] - (others.softmax(-1) * others).sum(), entropy_of(others).exp()


rows = st.tuples(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 6))


@settings(max_examples=60, deadline=None)
@given(row=rows, boost=st.floats(0, 8))
def test_entropy_is_a_function_of_margin_and_competitors_alone(row: tuple[int, int, float], boost: float) -> None:
    logits = draw_logits(*row)
    margin, competitors = margin_of(logits, 0)
    boosted = logits.clone()
    boosted[0] += boost
    assert float(margin_entropy(margin + boost, competitors)) == pytest.approx(float(entropy_of(boosted)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_the_slope_of_the_entropy_has_the_sign_of_minus_the_margin(row: tuple[int, int, float]) -> None:
    logits = draw_logits(*row).requires_grad_()
    entropy_of(logits).backward()
    margin, _ = margin_of(logits.detach(), 0)
    share = logits.detach().softmax(-1)[0]
    assert logits.grad is not None
    assert float(logits.grad[0]) == pytest.approx(float(-share * (1 - share) * margin), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(row=rows)
def test_a_key_below_its_share_raises_entropy_until_the_critical_boost(row: tuple[int, int, float]) -> None:
    margin, competitors = margin_of(draw_logits(*row), 0)
    start = margin_entropy(margin, competitors)
    boosts = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    critical, largest = critical_boost(margin, competitors), torch.log1p(competitors)
    assert float(margin_entropy(torch.zeros_like(margin), competitors)) == pytest.approx(float(largest), abs=1e-12)
    assert bool((margin_entropy(margin + boosts, competitors) <= largest + 1e-12).all())
    if margin >= 0:
        assert critical == 0
        assert bool((margin_entropy(margin + boosts, competitors) < start + 1e-12).all())
    else:
        assert abs(margin) <= critical <= 2 * abs(margin) + 1e-12
        inside, outside = critical * boosts * 0.99, critical * (1.01 + boosts)
        assert bool((margin_entropy(margin + inside, competitors) >= start - 1e-12).all())
        assert bool((margin_entropy(margin + outside, competitors) <= start + 1e-12).all())
        assert largest - start <= torch.log1p(1 / competitors) + 1e-12


def test_one_competitor_makes_the_critical_boost_twice_the_margin() -> None:
    margin = torch.tensor([-0.5, -2.0, -5.0], dtype=torch.float64)
    assert torch.allclose(critical_boost(margin, torch.ones(3, dtype=torch.float64)), -2 * margin)


def test_the_counter_examples_of_the_documentation() -> None:
    sharp = torch.tensor([-2.0, 0.0], dtype=torch.float64)
    assert float(entropy_of(sharp)) == pytest.approx(0.3653, abs=5e-5)
    assert float(entropy_of(sharp + torch.tensor([2.0, 0.0]))) == pytest.approx(math.log(2), abs=5e-5)
    diffuse = torch.zeros(1024, dtype=torch.float64)
    found = []
    for boost in (0.0, 2.0, 4.0):
        diffuse[0] = boost - 2.0
        found.append(float(entropy_of(diffuse)))
    assert found == pytest.approx([6.9309, 6.9315, 6.9233], abs=5e-5)


def test_a_boosted_set_blurs_a_sharp_row_and_ends_at_its_own_entropy() -> None:
    logits = torch.zeros(1024, dtype=torch.float64)
    logits[0] = 9.0
    members = torch.arange(1024) >= 1024 - 102
    start = entropy_of(logits)
    found = [float(entropy_of(logits + boost * members)) for boost in (0.0, 1.0, 5.0, 60.0)]
    assert found == pytest.approx([1.128, 1.268, 3.942, math.log(102)], abs=5e-4)
    assert float(start) < found[-1]


@settings(max_examples=60, deadline=None)
@given(row=rows, boost=st.floats(-6, 6))
def test_set_version_is_the_chain_rule_and_its_derivative(row: tuple[int, int, float], boost: float) -> None:
    seed, keys, scale = row
    logits, members = draw_logits(seed, keys + 2, scale), torch.arange(keys + 2) % 3 == 0
    amount = torch.tensor(boost, dtype=torch.float64, requires_grad=True)
    entropy = entropy_of(logits + amount * members)
    entropy.backward()
    of_set, of_rest = entropy_of(logits[members]), entropy_of(logits[~members])
    odds = logits[members].logsumexp(-1) - logits[~members].logsumexp(-1) + boost
    share = torch.sigmoid(odds)
    binary = torch.special.entr(share) + torch.special.entr(1 - share)
    assert float(binary + share * of_set + (1 - share) * of_rest) == pytest.approx(float(entropy.detach()), abs=1e-12)
    assert amount.grad is not None
    slope = -share * (1 - share) * (odds - (of_set - of_rest))
    assert float(slope) == pytest.approx(float(amount.grad), abs=1e-9)
    largest = torch.logaddexp(of_set, of_rest)
    assert entropy.detach() <= largest + 1e-12
    peak = boost + (of_set - of_rest) - odds
    assert float(entropy_of(logits + peak * members)) == pytest.approx(float(largest), abs=1e-12)


def test_a_key_with_all_the_weight_has_no_known_margin() -> None:
    scores = torch.tensor([[[[60.0, 0.0]]]], dtype=torch.float64)
    found = audit_rows(
        scores, scores + 1, visible=torch.ones(2, dtype=torch.bool), is_meta=torch.tensor([[True, False]])
    )
    assert found.boosts.margin.isnan().all()
    assert not found.boosts.is_known.any()


def test_audit_finds_a_pure_boost_exactly() -> None:
    """Where only meta keys gain, and all alike, the mechanism is the whole change."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 3, 5, 9, generator=generator, dtype=torch.float64) * 2
    is_meta = torch.arange(9).expand(2, -1) % 4 == 1
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)
    common = torch.randn(2, 3, 5, 1, generator=generator, dtype=torch.float64)
    one_key = torch.arange(9) == 1
    after = before + 1.5 * one_key + common
    found = audit_rows(before, after, visible=visible, is_meta=is_meta & one_key)
    torch.testing.assert_close(found.entropy_without, entropy_of(before.masked_fill(~visible, -torch.inf)))
    pure = audit_rows(before, before + 1.5 * one_key, visible=visible, is_meta=is_meta & one_key)
    torch.testing.assert_close(pure.mechanism, pure.entropy_with - pure.entropy_without)
    torch.testing.assert_close(found.entropy_with, pure.entropy_with)
    assert (found.boosts.boost > 0).all()
    assert torch.equal(found.boosts.is_beyond[..., 0], found.entropy_with < found.entropy_without)
    assert 0 < int((found.boosts.margin >= 0).sum()) < found.boosts.margin.numel()


def test_boosts_are_those_of_the_definition_in_rows_with_unequal_numbers_of_meta_keys() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(2, 2, 7, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    is_meta = torch.zeros(2, 7, dtype=torch.bool)
    is_meta[0, [0, 2, 5]] = is_meta[1, [3]] = True
    found = audit_rows(before, after, visible=visible, is_meta=is_meta)
    assert found.boosts.boost.shape == (2, 2, 7, 3)
    num_edges = torch.zeros(2, 7, dtype=torch.long)
    for batch, head, query, number in torch.cartesian_prod(*map(torch.arange, (2, 2, 7, 3))).tolist():
        keys = is_meta[batch].nonzero()[:, 0].tolist()
        values = [
            getattr(found.boosts, name)[batch, head, query, number] for name in ("margin", "competitors", "boost")
        ]
        if number >= len(keys) or keys[number] > query or query == 0:  # the first query sees nothing else
            assert all(value.isnan() for value in values)
            continue
        num_edges[batch, query] += head == 0
        row, new = (scores[batch, head, query, : query + 1] for scores in (before, after))
        margin, competitors = margin_of(row, keys[number])
        others = torch.arange(query + 1) != keys[number]
        rise = (row[others].softmax(-1) * (new - row)[others]).sum()
        expected = [margin, competitors, (new - row)[keys[number]] - rise]
        torch.testing.assert_close(torch.stack(values), torch.stack(expected))
    assert torch.equal(found.boosts.is_known.sum(-1)[:, 0], num_edges)


@settings(max_examples=60, deadline=None)
@given(row=rows, boost=st.floats(-4, 12))
def test_a_boost_is_beyond_where_it_exceeds_the_critical_one(row: tuple[int, int, float], boost: float) -> None:
    margin, competitors = margin_of(draw_logits(*row), 0)
    critical = critical_boost(margin, competitors)
    found = KeyBoosts(margin, competitors, torch.tensor(boost, dtype=torch.float64)).is_beyond
    if abs(float(boost - critical)) > 1e-3:
        assert bool(found) == (boost > critical)
