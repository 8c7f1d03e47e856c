"""Ridge on held-out documents, retrieval of the own prefix and CKA, on data whose answers are known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis_inputs import records_of, text_inputs, value_of
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.representations.decodability import (
    PENALTIES,
    Decodability,
    RidgePath,
    Spectrum,
    chance_reciprocal_rank,
    cka_without_each_document,
    collect_prefix_states,
    debiased_linear_cka,
    held_out_ridge,
    held_out_ridges,
    reciprocal_ranks,
)
from metatokens.analysis.representations.places import Places
from metatokens.errors import UsageError
from metatokens.lens import Lens
from metatokens.lens.residuals import capture_residuals, mean_of_last
from tiny_models import META, tiny_model, tokens


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# the text before a position --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3])
def test_mean_of_last_equals_the_definition(window: int) -> None:
    embeddings = random_states(2, 11, 4)
    text = torch.tensor([[c == "x" for c in row] for row in ("xx_xxx_xx_x", "__xxxx_x_xx")])
    means, enough = mean_of_last(embeddings, text, window)
    for row in range(2):
        for position in range(11):
            before = [j for j in range(position) if text[row, j]][-window:]
            assert bool(enough[row, position]) == (len(before) == window)
            expected = embeddings[row, before].mean(0) if before else torch.zeros(4, dtype=torch.float64)
            torch.testing.assert_close(means[row, position], expected)


def test_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        mean_of_last(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), 0)


def r_squared(read: Decodability) -> float:
    return float(1 - read.residual_squares.sum() / read.total_squares.sum())


# ridge -----------------------------------------------------------------------------------------------------------


def linear_data(
    num_documents: int = 15, per_document: int = 12, noise: float = 0.0
) -> tuple[Tensor, Tensor, list[int]]:
    num = num_documents * per_document
    states, weights = random_states(num, 6), random_states(6, 3, seed=1)
    targets = states @ weights + 2 + noise * random_states(num, 3, seed=2)
    return states, targets, [i // per_document for i in range(num)]


def test_linear_data_are_read_perfectly() -> None:
    states, targets, documents = linear_data()
    read = held_out_ridge(states, targets, documents, seed=0, penalties=(1e-8, 1.0))
    assert r_squared(read) > 1 - 1e-9
    assert (read.reciprocal_rank == 1).all()
    assert read.residual_squares.shape == (15,)


def test_noise_that_is_half_the_variance_leaves_half_of_r_squared() -> None:
    states, targets, documents = linear_data(num_documents=60, per_document=30)
    noise = random_states(*targets.shape, seed=3) * targets.std(0)
    read = held_out_ridge(states, targets + noise, documents, seed=0)
    assert r_squared(read) == pytest.approx(0.5, abs=0.05)


def test_independent_targets_are_not_read() -> None:
    states, _, documents = linear_data()
    read = held_out_ridge(states, random_states(len(states), 3, seed=9), documents, seed=0)
    assert -0.1 < r_squared(read) < 0.03
    assert read.reciprocal_rank.mean() < 3 * read.chance.mean()


def test_what_is_the_same_within_a_document_alone_is_not_read() -> None:
    # states name the document, targets are one random vector a document: split by rows, this would be read perfectly
    documents = [i // 10 for i in range(200)]
    states = torch.nn.functional.one_hot(torch.tensor(documents)).double()
    targets = random_states(20, 3, seed=4)[documents]
    assert r_squared(held_out_ridge(states, targets, documents, seed=0)) < 0.01


def test_offset_and_scale_of_states_and_targets_do_not_matter() -> None:
    states, targets, documents = linear_data(noise=1.0)
    read = held_out_ridge(states, targets, documents, seed=0)
    moved = held_out_ridge(states * torch.tensor([1e3, 1, 1, 1, 1, 1e-3]) + 5, targets * 7 - 3, documents, seed=0)
    assert r_squared(moved) == pytest.approx(r_squared(read), abs=1e-9)
    np.testing.assert_allclose(moved.reciprocal_rank, read.reciprocal_rank)


def test_fit_equals_the_normal_equations() -> None:
    states, targets, documents = linear_data(num_documents=3, per_document=20, noise=1.0)
    read = held_out_ridge(states, targets, documents, seed=0, penalties=(0.3,), folds=3)
    ids, order = np.array(documents), np.random.Generator(np.random.PCG64(0)).permutation(3) % 3
    for tested in range(3):
        fitted = torch.from_numpy(ids == int(np.flatnonzero(order == (tested + 2) % 3)[0]))
        document = int(np.flatnonzero(order == tested)[0])
        x = (states[fitted] - states[fitted].mean(0)) / states[fitted].std(0, correction=0)
        y = targets[fitted] - targets[fitted].mean(0)
        weights = torch.linalg.solve(x.T @ x + 20 * 0.3 * torch.eye(6, dtype=torch.float64), x.T @ y)
        held_out = torch.from_numpy(ids == document)
        x = (states[held_out] - states[fitted].mean(0)) / states[fitted].std(0, correction=0)
        error = (x @ weights + targets[fitted].mean(0) - targets[held_out]).square().sum()
        assert read.residual_squares[document] == pytest.approx(float(error))


def test_fewer_documents_than_folds_are_refused() -> None:
    states, targets, documents = linear_data(4)
    with pytest.raises(UsageError, match="at least 5 documents, found 4"):
        held_out_ridge(states, targets, documents, seed=0)


@pytest.mark.parametrize(("folds", "penalties"), [(2, (1.0,)), (5, (0.0, 1.0)), (5, ())])
def test_folds_and_penalties_that_cannot_be_are_refused(folds: int, penalties: Sequence[float]) -> None:
    states, targets, documents = linear_data(9)
    with pytest.raises(ValueError, match="held-out ridge"):
        held_out_ridge(states, targets, documents, seed=0, folds=folds, penalties=penalties)


# retrieval -------------------------------------------------------------------------------------------------------


def test_perfect_predictions_rank_first_and_opposite_ones_last() -> None:
    targets, own, documents = random_states(30, 8), torch.arange(30), np.arange(30)
    assert (reciprocal_ranks(targets * 3, targets, own=own, documents=documents) == 1).all()
    opposite = reciprocal_ranks(-targets, targets, own=own, documents=documents)
    torch.testing.assert_close(opposite, torch.full((30,), 1 / 30, dtype=torch.float64))


def test_random_predictions_rank_as_chance() -> None:
    targets, predictions = random_states(600, 16), random_states(600, 16, seed=1)
    ranks = reciprocal_ranks(predictions, targets, own=torch.arange(600), documents=np.arange(600))
    chance = chance_reciprocal_rank(600)
    assert chance == pytest.approx(sum(1 / i for i in range(1, 601)) / 600)
    # the standard error of the mean of 1 / rank is 0.002 here
    assert float(ranks.mean()) == pytest.approx(chance, abs=0.008)


def test_prefixes_of_the_same_document_are_no_candidates() -> None:
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    prediction = torch.tensor([[1.0, 0.1]])
    own = torch.tensor([0])
    apart = reciprocal_ranks(prediction, targets, own=own, documents=np.array([0, 1, 2]))
    together = reciprocal_ranks(prediction, targets, own=own, documents=np.array([0, 0, 2]))
    assert (float(apart), float(together)) == (0.5, 1.0)


def test_a_prediction_of_nothing_ranks_in_the_middle() -> None:
    targets = random_states(21, 4)
    ranks = reciprocal_ranks(torch.zeros(1, 4), targets, own=torch.tensor([3]), documents=np.arange(21))
    assert float(ranks) == pytest.approx(1 / 11)


def test_errors_of_a_path_are_those_of_its_predictions() -> None:
    states, targets = random_states(50, 6, seed=1), random_states(50, 4, seed=2)
    targets += states[:, :4]
    path = RidgePath(Spectrum(states[:30]), targets[:30])
    expected = [float((path.predict(states[30:], one) - targets[30:]).square().sum()) for one in PENALTIES]
    assert path.errors(states[30:], targets[30:], PENALTIES) == pytest.approx(expected, rel=1e-10)
    assert len(set(expected)) == len(PENALTIES)


def test_several_targets_of_the_same_states_are_read_as_one_by_one() -> None:
    states, documents = random_states(60, 5, seed=1), np.arange(60) // 6
    targets = torch.stack([random_states(60, 4, seed=seed) + states[:, :4] for seed in (2, 3)])
    together = held_out_ridges(states, targets, documents, seed=0)
    for one, of_set in zip(together, targets, strict=True):
        for found, alone in zip(one, held_out_ridge(states, of_set, documents, seed=0), strict=True):
            np.testing.assert_allclose(found, alone, rtol=1e-12)
    assert (together[0].residual_squares != together[1].residual_squares).all()


# CKA -------------------------------------------------------------------------------------------------------------


def slow_cka(first: Tensor, second: Tensor) -> float:
    """Song et al. 2012, eq. 5, with the n x n kernels."""

    def hsic(kernel: Tensor, other: Tensor) -> float:
        num = len(kernel)
        k, m = kernel - kernel.diag().diag(), other - other.diag().diag()
        ones = torch.ones(num, dtype=torch.float64)
        total = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((num - 1) * (num - 2))
        return float((total - 2 / (num - 2) * (ones @ k @ m @ ones)) / (num * (num - 3)))

    a, b = first @ first.T, second @ second.T
    return hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5


def related_states(num: int = 40) -> tuple[Tensor, Tensor]:
    first = random_states(num, 7)
    return first, first @ random_states(7, 5, seed=1) + random_states(num, 5, seed=2)


def test_cka_equals_its_definition() -> None:
    first, second = related_states()
    assert debiased_linear_cka(first, second) == pytest.approx(slow_cka(first, second), abs=1e-10)
    assert 0.1 < debiased_linear_cka(first, second) < 0.95


def test_cka_ignores_rotation_scale_and_offset_and_is_symmetric() -> None:
    first, second = related_states()
    rotation = torch.linalg.qr(random_states(7, 7, seed=5)).Q
    value = debiased_linear_cka(first, second)
    assert debiased_linear_cka(1e3 * first @ rotation + 1e4, second - 8) == pytest.approx(value, abs=1e-8)
    assert debiased_linear_cka(second, first) == pytest.approx(value, abs=1e-12)
    assert debiased_linear_cka(first, 2 * first @ rotation + 1) == pytest.approx(1, abs=1e-10)


def test_cka_does_see_an_uneven_scale() -> None:
    first, second = related_states()
    stretched = first * torch.tensor([10.0, 1, 1, 1, 1, 1, 1])
    assert abs(debiased_linear_cka(stretched, second) - debiased_linear_cka(first, second)) > 0.05


def test_cka_of_independent_states_is_about_zero_though_dimensions_outnumber_pairs() -> None:
    # the biased estimate is above 0.9 here
    values = [
        debiased_linear_cka(random_states(50, 300, seed=s), random_states(50, 300, seed=s + 99)) for s in range(8)
    ]
    assert abs(np.mean(values)) < 0.05


def test_cka_without_a_document_is_that_of_the_others() -> None:
    first, second = related_states(30)
    documents = [3] * 10 + [1] * 12 + [2] * 8
    values = cka_without_each_document(first, second, documents)
    assert values[0] == debiased_linear_cka(torch.cat([first[:10], first[22:]]), torch.cat([second[:10], second[22:]]))
    assert values[2] == debiased_linear_cka(first[10:], second[10:])


def test_cka_of_too_few_or_constant_states_is_undefined() -> None:
    first, second = related_states()
    assert math.isnan(debiased_linear_cka(first[:3], second[:3]))
    assert math.isnan(debiased_linear_cka(first, torch.ones(40, 2)))


def test_cka_of_states_that_are_no_pairs_is_refused() -> None:
    first, second = related_states()
    with pytest.raises(ValueError, match="not of 40 and 39"):
        debiased_linear_cka(first, second[:39])


# on a model ------------------------------------------------------------------------------------------------------


def places_in(*pictures: str, steps_back: int = 0) -> Places:
    rows = [tokens(picture, seed=number) for number, picture in enumerate(pictures)]
    documents = [Document(picture, ids, ids == META) for picture, ids in zip(pictures, rows, strict=True)]
    return Places("meta-token", documents, [one.is_meta for one in documents], steps_back)


def test_collected_states_stand_beside_the_text_before_them() -> None:
    model = tiny_model()
    lens = Lens(model)
    places = places_in("x_xx_xxx_x", "xxxxx", "xxxx_x_x")
    collected = collect_prefix_states(lens, places, windows=(1, 2))
    # the meta-token at column 1 of the first document has one text token before it and is left out
    assert collected.documents.tolist() == [0, 0, 2, 2]
    first, last = (places.documents[number].input_ids for number in (0, 2))
    states = [*capture_residuals(lens, first)[1][0, [4, 8]], *capture_residuals(lens, last)[1][0, [4, 6]]]
    torch.testing.assert_close(collected.states[1], torch.stack(states))
    embed = model.model.embed_tokens.weight.float()  # as the states are kept
    torch.testing.assert_close(collected.prefixes[1, 0], embed[first[0, [2, 3]]].mean(0))
    torch.testing.assert_close(collected.prefixes[1, 3], embed[last[0, [3, 5]]].mean(0))
    torch.testing.assert_close(collected.prefixes[0, 3], embed[last[0, 5]])


def test_a_step_back_keeps_the_text_and_takes_the_state_before() -> None:
    lens = Lens(tiny_model())
    pictures = ("xxx_xxx_xx", "_xxxx_xxxx")
    collected, back = (
        collect_prefix_states(lens, places_in(*pictures, steps_back=steps), windows=(2,)) for steps in (0, 1)
    )
    torch.testing.assert_close(back.prefixes, collected.prefixes)
    first, second = (capture_residuals(lens, one.input_ids)[2][0] for one in places_in(*pictures).documents)
    torch.testing.assert_close(back.states[2], torch.stack([first[2], first[6], second[4]]))


def test_documents_without_such_a_place_are_refused() -> None:
    with pytest.raises(UsageError, match="documents that have meta-tokens"):
        collect_prefix_states(Lens(tiny_model()), places_in("xxxx"), windows=(1,))


def test_states_before_the_first_block_are_those_of_one_embedding_and_tell_nothing() -> None:
    places = places_in(*["xxx_xxxx_xxx_xxx_xxxx_xx"] * 6)
    collected = collect_prefix_states(Lens(tiny_model()), places, windows=(1, 4))
    assert collected.states.shape == (3, 6 * 4, 32)  # before the first meta-token stand three text tokens
    read = held_out_ridge(collected.states[0], collected.prefixes[0], collected.documents, seed=0)
    assert r_squared(read) <= 1e-9


def test_the_token_right_before_is_decodable_from_its_own_embedding_and_not_from_a_meta_token_s() -> None:
    inputs = text_inputs()
    at = {"layer": 0, "window": 1}
    assert value_of("decodability", inputs, state="token before it", **at) > 0.5
    assert value_of("decodability", inputs, state="meta-token", **at) < 0.1  # all are one vector before the first block
    chance = value_of("prefix_rank_chance", inputs, state="meta-token", window=1)
    assert value_of("prefix_rank", inputs, state="meta-token", **at) < 3 * chance
    assert not records_of("cka", inputs, state="meta-token", layer=0)
    (cka,) = records_of("cka", inputs, state="ordinary token", layer=1)
    assert cka.low < cka.value < cka.high
    assert {one.at["window"] for one in records_of("decodability", inputs)} == {1, 4}


def test_documents_too_short_for_any_window_leave_decodability_out_with_the_reason() -> None:
    inputs = text_inputs(length=3)
    assert records_of("decodability", inputs) == records_of("cka", inputs) == []
    (reason,) = inputs.skipped
    assert "longer documents" in reason
