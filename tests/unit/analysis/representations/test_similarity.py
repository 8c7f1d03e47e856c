"""Cosines by layer and distance against their definition, the controls, and what centring takes away."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from analysis_inputs import document, records_of, text_inputs, value_of
from metatokens.analysis.inputs.documents import Document, choose_other_documents
from metatokens.analysis.representations.similarity import (
    FORMS,
    Calibration,
    calibrate,
    compare_cosines,
    matched_pairs,
    mean_cosines,
    select_pairs,
    standardize,
)
from metatokens.lens import Lens
from metatokens.lens.residuals import capture_residuals
from tiny_models import META, NUM_TEXT_TOKENS, tiny_model, tokens

DISTANCES = (1, 2, 4)


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calibration_of(states: Tensor) -> Calibration:
    return Calibration.of(states.flatten(0, -2))


def no_calibration(width: int) -> Calibration:
    return Calibration(torch.zeros(width), torch.ones(width))


def raw_cosines(states: Tensor, pairs: Tensor, distances: tuple[int, ...]) -> np.ndarray:
    return mean_cosines([states], pairs, distances, calibrations=[no_calibration(states.shape[-1])])[:, 0, 0]


def cosines(states: Tensor, distances: tuple[int, ...] = DISTANCES) -> np.ndarray:
    everything = torch.ones(states.shape[:2], dtype=torch.bool)
    return raw_cosines(states, select_pairs(everything, everything, distances), distances)


# cosines ---------------------------------------------------------------------------------------------------------


def test_cosines_equal_the_definition() -> None:
    states = random_states(2, 9, 5)
    queries, keys = random_states(2, 9, seed=1) > -0.5, random_states(2, 9, seed=2) > -0.5
    pairs = select_pairs(queries, keys, DISTANCES)
    expected, counts = np.zeros((2, 3)), np.zeros((2, 3))
    for row in range(2):
        for position in range(9):
            for index, distance in enumerate(DISTANCES):
                if position >= distance and queries[row, position] and keys[row, position - distance]:
                    a, b = states[row, position].tolist(), states[row, position - distance].tolist()
                    dot = sum(x * y for x, y in zip(a, b, strict=True))
                    expected[row, index] += dot / math.hypot(*a) / math.hypot(*b)
                    counts[row, index] += 1
    assert counts.min() > 0
    np.testing.assert_array_equal(pairs.sum(1).numpy(), counts)
    np.testing.assert_allclose(raw_cosines(states, pairs, DISTANCES), expected / counts, atol=1e-12)


def test_row_without_a_pair_has_no_cosine() -> None:
    mask = torch.tensor([[True, True, True], [True, False, True]])
    found = raw_cosines(random_states(2, 3, 4), select_pairs(mask, mask, (1,)), (1,))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_orthogonal_states_have_cosine_zero_and_equal_ones_one() -> None:
    orthogonal = torch.eye(8)[None]
    np.testing.assert_allclose(cosines(orthogonal), 0, atol=1e-7)
    np.testing.assert_allclose(cosines(random_states(1, 1, 8).expand(1, 8, 8)), 1, atol=1e-9)
    np.testing.assert_allclose(cosines(random_states(1, 1, 8) * torch.tensor([-1.0, 1.0] * 4)[:, None], (1,)), -1, 1e-9)


def test_state_of_zeros_has_cosine_zero() -> None:
    np.testing.assert_array_equal(cosines(torch.zeros(1, 5, 4)), 0)


def test_distance_longer_than_the_sequence_has_no_pairs() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert select_pairs(mask, mask, (5, 64)).sum() == 0


def test_distance_zero_is_refused() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="count from 1"):
        select_pairs(mask, mask, (0, 1))


# forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["centred", "z_scored"])
def test_centring_removes_a_constant_offset(form: str) -> None:
    states, offset = random_states(4, 32, 8), 50 * torch.ones(8)
    assert cosines(states + offset).min() > 0.99
    moved = standardize(states + offset, calibration_of(states + offset), form)
    still = standardize(states, calibration_of(states), form)
    np.testing.assert_allclose(cosines(moved), cosines(still), atol=1e-9)
    assert np.abs(cosines(moved).mean()) < 0.1


def test_z_scores_remove_a_dimension_that_outweighs_all_others() -> None:
    states = random_states(2, 64, 8)
    scaled = states * torch.tensor([1000.0] + [1.0] * 7)
    centred, z_scored = (cosines(standardize(scaled, calibration_of(scaled), form)) for form in ("centred", "z_scored"))
    even = cosines(standardize(states, calibration_of(states), "z_scored"))
    np.testing.assert_allclose(z_scored, even, atol=1e-9)
    assert np.abs(centred - even).max() > 0.05


def test_z_scores_leave_out_a_dimension_that_never_varies() -> None:
    states = random_states(2, 20, 4)
    states[..., 2] = 7
    scored = standardize(states, calibration_of(states), "z_scored")
    assert scored.isfinite().all()
    assert (scored[..., 2] == 0).all()


def test_deviation_survives_a_mean_a_million_times_larger() -> None:
    # the sum of squares minus the square of the sum would lose all digits of a float32
    states = (random_states(400, 4) * 1e-2 + 1e4).float()
    expected = states.numpy().astype(np.float64).std(0)
    np.testing.assert_allclose(Calibration.of(states).deviation.numpy(), expected, rtol=1e-9)


# pairs and controls ----------------------------------------------------------------------------------------------


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[character == "_" for character in row] for row in rows])


def test_matched_pairs_have_ordinary_tokens_everywhere_but_at_the_query() -> None:
    runs = mask_of("xx_xxxx_", "xxxx_xxx"), mask_of("xxxxx_x_", "_xxxxxxx")
    pairs = matched_pairs(*runs, (1, 2), torch.tensor([1, 0]))
    found = {tuple(entry) for entry in pairs.nonzero().tolist()}
    # row 0: 7 is a meta-token in both runs; the query 2 sees 1, but 0 is a meta-token of the other document's control
    # row 1: the query 4 sees 3, but 2 is a meta-token of the other document
    assert found == {(0, 2, 0), (1, 4, 0)}


# on models -------------------------------------------------------------------------------------------------------

META_RUN = ("xxx_xxxx_xxx_xxxxxxx", "xx_xxxxxx_xxxxx_xxxx", "xxxxx_xx_xxxxxxxx_xx")
CONTROL_RUN = ("_xxxxxx_xxxxxxx_xxxx", "xxxx_xxxxxxx_xxx_xxx", "xx_xxxx_xxxxxx_xxxxx")


def same_text(meta_rows: tuple[str, ...], other_rows: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return two runs (B, T) that differ in where the meta-tokens are."""
    first = tokens(*meta_rows)
    second = torch.full_like(first, META)
    for row, picture in enumerate(other_rows):
        second[row, [character == "x" for character in picture]] = first[row][first[row] != META]
    return first, second


def test_measured_cosines_equal_the_slow_definition() -> None:
    lens = Lens(tiny_model())
    meta_run, control_run = same_text(META_RUN, CONTROL_RUN)
    calibrations = calibrate(lens, [tokens("xx_xxxxx_xxx", seed=5), tokens("xxxx_xxxxx_x", seed=6)])
    measured = compare_cosines(lens, meta_run, control_run, calibrations=calibrations, distances=DISTANCES, seed=3)
    states, control = capture_residuals(lens, meta_run), capture_residuals(lens, control_run)
    is_meta, is_control_meta = meta_run == META, control_run == META
    ordinary = ~is_meta & ~is_control_meta
    partners = choose_other_documents(3, seed=3).tolist()
    num_pairs = 0
    for form, layer, distance in [("raw", 0, 1), ("centred", 1, 2), ("z_scored", 2, 1), ("centred", 2, 4)]:
        a, b = (standardize(run[layer], calibrations[layer], form) for run in (states, control))
        for row, partner in enumerate(partners):
            places = [
                m
                for m in range(distance, 20)
                if is_meta[row, m] and not is_control_meta[row, m]
                if ordinary[row, m - distance] and ordinary[partner, m - distance]
            ]
            num_pairs += len(places)
            arms = {"meta": (a, a, row), "shuffled": (a, a, partner), "ordinary": (b, b, row)}
            for arm, (late, early, other) in arms.items():
                expected = [float(torch.cosine_similarity(late[row, m], early[other, m - distance], 0)) for m in places]
                value = getattr(measured, arm)[row, FORMS.index(form), layer, DISTANCES.index(distance)]
                assert value == pytest.approx(np.mean(expected), abs=1e-5) if places else np.isnan(value)
    assert num_pairs > 10
    np.testing.assert_array_equal(measured.excess, measured.meta - measured.ordinary)


def test_control_of_another_text_is_refused() -> None:
    lens = Lens(tiny_model())
    meta_run, control_run = same_text(META_RUN, CONTROL_RUN)
    calibrations = calibrate(lens, [meta_run[:1]])
    changed = control_run.clone()
    changed[0, 1] = (changed[0, 1] + 1) % NUM_TEXT_TOKENS
    for control in (changed, control_run[:, :-1]):
        with pytest.raises(ValueError, match="the same texts"):
            compare_cosines(lens, meta_run, control, calibrations=calibrations, distances=(1,), seed=0)


def test_calibration_is_of_all_tokens_of_all_documents() -> None:
    lens = Lens(tiny_model())
    documents = [tokens("xx_xxxxx"), tokens("xxx_x_", seed=1)]
    calibrations = calibrate(lens, documents)
    states = [capture_residuals(lens, ids) for ids in documents]
    assert len(calibrations) == 3
    for layer, calibration in enumerate(calibrations):
        together = torch.cat([one[layer][0] for one in states]).double()
        torch.testing.assert_close(calibration.mean, together.mean(0))
        torch.testing.assert_close(calibration.deviation, together.std(0, correction=0))


def test_plain_gpt2_has_cosines_of_its_ordinary_tokens() -> None:
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    lens = Lens(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    states, mask = capture_residuals(lens, ids), torch.ones_like(ids, dtype=torch.bool)
    pairs = select_pairs(mask, mask, DISTANCES)
    found = mean_cosines(states, pairs, DISTANCES, calibrations=calibrate(lens, [ids[:1]]))
    expected = torch.cosine_similarity(states[1][:, 4:], states[1][:, :-4], dim=-1).mean(1)
    np.testing.assert_allclose(found[:, 0, 1, 2], expected.numpy(), atol=1e-5)
    assert found.shape == (2, 3, 3, 3)


def test_recorded_excess_is_the_centred_cosine_of_meta_tokens_minus_that_of_ordinary_ones() -> None:
    inputs = text_inputs(distances=(1, 4, 32))
    documents, control = inputs.subject.documents, inputs.subject.control
    found = compare_cosines(
        inputs.lens,
        torch.cat([one.input_ids for one in documents]),
        torch.cat([one.input_ids for one in control]),
        calibrations=calibrate(inputs.lens, [one.input_ids for one in inputs.subject.calibration]),
        distances=(1, 4),
        seed=0,
    )
    excess = (found.meta - found.ordinary)[:, FORMS.index("centred")]
    value = value_of("excess_cosine", inputs, layer=1, distance=4)
    assert value == pytest.approx(np.nanmean(excess[:, 1, 1]), abs=1e-9)
    near = np.nanmean(excess[:, 1:, 0].mean(axis=1))
    assert value_of("near_excess_cosine", inputs) == pytest.approx(near, abs=1e-9)
    assert len(records_of("cosine", inputs)) == 3 * 3 * 3 * 2
    assert inputs.skipped == ["similarity at distances from 20, half a document"]


def test_measures_without_their_distances_say_so() -> None:
    inputs = text_inputs(distances=(2,))
    assert records_of("near_excess_cosine", inputs) + records_of("fading_cosine", inputs) == []
    assert inputs.skipped == [
        "similarity: near_excess_cosine needs distance 1",
        "similarity: fading_cosine needs distance 1 and a larger one",
    ]


@pytest.mark.parametrize(
    ("missing", "found"),
    [
        ({"control": []}, "found 10 of 1 lengths, 0 controls, 6 for calibration"),
        ({"calibration": []}, "found 10 of 1 lengths, 10 controls, 0 for calibration"),
        ({"documents": [document(0)], "control": [document(0, 1)]}, "found 1 of 1 lengths"),
        ({"documents": [document(number, length=30 + number) for number in range(10)]}, "found 10 of 10 lengths"),
    ],
)
def test_a_subject_of_one_s_own_without_a_pair_or_control_has_no_cosines_and_says_why(
    missing: dict[str, list[Document]], found: str
) -> None:
    inputs = text_inputs(distances=(1, 4))
    inputs.subject = replace(inputs.subject, **missing)  # type: ignore[arg-type]
    assert records_of("excess_cosine", inputs) == []
    assert found in inputs.skipped[-1]
