"""Cosines by layer and distance against their definition, the controls, and what centring takes away."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from metatokens.analysis.inputs.documents import choose_other_documents
from metatokens.analysis.representations.similarity import (
    VARIANTS,
    Calibration,
    CosineCurves,
    ExcessCosine,
    Moments,
    calibrate,
    matched_pairs,
    measure_cosines,
    measure_excess_cosine,
    select_pairs,
    standardize,
    sum_cosines,
)
from metatokens.errors import UsageError
from metatokens.lens import Lens
from metatokens.lens.residuals import capture_residuals
from tiny_models import META, NUM_TEXT_TOKENS, attention_mask_of, tiny_model, tokens

DISTANCES = (1, 2, 4)


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calibration_of(states: Tensor, is_meta: Tensor) -> Calibration:
    return Calibration.empty(states.shape[-1]).add(states.flatten(0, -2), is_meta.flatten())


def everything(states: Tensor) -> Tensor:
    return torch.ones(states.shape[:2], dtype=torch.bool)


def cosines(states: Tensor, distances: tuple[int, ...] = DISTANCES) -> np.ndarray:
    pairs = select_pairs(everything(states), everything(states), distances)
    return sum_cosines(states, states, pairs, distances) / pairs.sum(1).numpy()


# moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 50])
def test_moments_in_pieces_equal_those_of_the_whole(size: int) -> None:
    states = random_states(50, 6) * 3
    moments = Moments.empty(6)
    for piece in states.split(size):
        moments = moments.add(piece).add(piece[:0])
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, states.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.deviation, states.double().std(0, correction=0), rtol=1e-12, atol=1e-12)


def test_variance_survives_a_mean_a_million_times_larger() -> None:
    # the sum of squares minus the square of the sum would lose all digits of a float32
    states = (random_states(400, 4).double() * 1e-2 + 1e4).float()
    moments = Moments.empty(4)
    for piece in states.split(7):
        moments = moments.add(piece)
    expected = states.numpy().astype(np.float64).std(0)
    np.testing.assert_allclose(moments.deviation.numpy(), expected, rtol=1e-9)


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
    np.testing.assert_allclose(sum_cosines(states, states, pairs, DISTANCES), expected, atol=1e-5)


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
    with pytest.raises(UsageError, match="above 0"):
        select_pairs(mask, mask, (0, 1))


# variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["centred", "z_scored", "centred_by_kind"])
def test_centring_removes_a_constant_offset(variant: str) -> None:
    states, offset = random_states(4, 32, 8), 50 * torch.ones(8)
    no_meta = torch.zeros(4, 32, dtype=torch.bool)
    assert cosines(states + offset).min() > 0.99
    moved = standardize(states + offset, no_meta, calibration_of(states + offset, no_meta), variant)
    still = standardize(states, no_meta, calibration_of(states, no_meta), variant)
    np.testing.assert_allclose(cosines(moved), cosines(still), atol=1e-4)
    assert np.abs(cosines(moved).mean()) < 0.1


def test_z_scores_remove_a_dimension_that_outweighs_all_others() -> None:
    states = random_states(2, 64, 8)
    scaled = states * torch.tensor([1000.0] + [1.0] * 7)
    no_meta = torch.zeros(2, 64, dtype=torch.bool)
    centred, z_scored = (
        cosines(standardize(scaled, no_meta, calibration_of(scaled, no_meta), variant))
        for variant in ("centred", "z_scored")
    )
    even = cosines(standardize(states, no_meta, calibration_of(states, no_meta), "z_scored"))
    np.testing.assert_allclose(z_scored, even, atol=1e-5)
    assert np.abs(centred - even).max() > 0.05


def test_z_scores_leave_out_a_dimension_that_never_varies() -> None:
    states = random_states(2, 20, 4)
    states[..., 2] = 7
    no_meta = torch.zeros(2, 20, dtype=torch.bool)
    scored = standardize(states, no_meta, calibration_of(states, no_meta), "z_scored")
    assert scored.isfinite().all()
    assert (scored[..., 2] == 0).all()


def test_centring_by_kind_removes_what_all_meta_tokens_share() -> None:
    states = random_states(6, 40, 8)
    is_meta = random_states(6, 40, seed=3) > 0.8
    shared = states + 20 * random_states(8, seed=4) * is_meta[..., None]
    by_kind, together = (
        standardize(shared, is_meta, calibration_of(shared, is_meta), variant)
        for variant in ("centred_by_kind", "centred")
    )
    expected = standardize(states, is_meta, calibration_of(states, is_meta), "centred_by_kind")
    torch.testing.assert_close(by_kind, expected, atol=1e-4, rtol=1e-4)
    assert (together[is_meta].norm(dim=-1).mean() / by_kind[is_meta].norm(dim=-1).mean()) > 5


def test_variant_without_calibration_is_refused() -> None:
    states, is_meta = random_states(1, 3, 4), torch.tensor([[False, True, False]])
    with pytest.raises(UsageError, match="calibrat"):
        standardize(states, is_meta, Calibration.empty(4), "centred")
    with pytest.raises(UsageError, match="0 meta-tokens"):
        standardize(states, is_meta, calibration_of(states, torch.zeros_like(is_meta)), "centred_by_kind")


# pairs and controls ----------------------------------------------------------------------------------------------


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[character == "_" for character in row] for row in rows])


def test_matched_pairs_have_ordinary_tokens_everywhere_but_at_the_query() -> None:
    runs = mask_of("xx_xxxx_", "xxxx_xxx"), mask_of("xxxxx_x_", "_xxxxxxx")
    keep = torch.ones(2, 8, dtype=torch.bool)
    partners = torch.tensor([1, 0])
    pairs = matched_pairs(*runs, (1, 2), partners=partners, keep_BT=keep)
    found = {tuple(entry) for entry in pairs.nonzero().tolist()}
    # row 0: 7 is a meta-token in both runs; the query 2 sees 1, but 0 is a meta-token of the other document's control
    # row 1: the query 4 sees 3, but 2 is a meta-token of the other document
    assert found == {(0, 2, 0), (1, 4, 0)}


def test_padding_is_in_no_pair() -> None:
    runs = mask_of("xxx_xxx", "xxx_xxx"), mask_of("xxxxx_x", "xxxxx_x")
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, 2] = False
    pairs = matched_pairs(*runs, (1, 2), partners=torch.tensor([1, 0]), keep_BT=keep)
    assert {tuple(entry) for entry in pairs.nonzero().tolist()} == {(0, 3, 1), (1, 3, 1)}


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


def test_measured_excess_equals_the_slow_definition() -> None:
    lens = Lens(tiny_model())
    documents = [4, 9, 6]
    meta_run, control_run = same_text(META_RUN, CONTROL_RUN)
    calibrations = calibrate(lens, [{"input_ids": tokens("xx_xxxxx_xxx", "xxxx_xxxxx_x", seed=5)}])
    measured = measure_excess_cosine(
        lens, meta_run, control_run, documents=documents, calibrations=calibrations, seed=3, distances=DISTANCES
    ).over_ordinary
    states, control = capture_residuals(lens, meta_run), capture_residuals(lens, control_run)
    is_meta, is_control_meta = meta_run == META, control_run == META
    ordinary = ~is_meta & ~is_control_meta
    partners = choose_other_documents(documents, seed=3).tolist()
    num_pairs = 0
    for variant, layer, distance in [("raw", 0, 1), ("centred", 1, 2), ("z_scored", 2, 1), ("centred_by_kind", 2, 4)]:
        a = standardize(states[layer], is_meta, calibrations[layer], variant)
        b = standardize(control[layer], is_control_meta, calibrations[layer], variant)
        for row, document in enumerate(documents):
            place = measured.documents.tolist().index(document)
            differences = [
                float(
                    torch.cosine_similarity(a[row, m], a[row, m - distance], dim=0)
                    - torch.cosine_similarity(b[row, m], b[row, m - distance], dim=0)
                )
                for m in range(distance, 20)
                if is_meta[row, m] and not is_control_meta[row, m]
                if ordinary[row, m - distance] and ordinary[partners[row], m - distance]
            ]
            num_pairs += len(differences)
            index = DISTANCES.index(distance)
            assert measured.counts[place, 0, 0, index] == len(differences)
            summed = measured.sums[place, VARIANTS.index(variant), layer, index]
            assert summed == pytest.approx(sum(differences), abs=1e-5)
    assert num_pairs > 10


def test_shuffled_control_takes_the_earlier_state_from_the_other_document() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xxx_xxxx", "xxx_xxxx", seed=1)
    partners = torch.tensor([1, 0])
    pairs = select_pairs(ids == META, ids != META, (2,))
    curves = measure_cosines(
        lens,
        ids,
        pairs,
        documents=[0, 1],
        partners=partners,
        calibrations=[],
        distances=(2,),
        variants=("raw",),
    )
    last = capture_residuals(lens, ids)[2]
    expected = [torch.cosine_similarity(last[row, 3], last[1 - row, 1], dim=0) for row in range(2)]
    np.testing.assert_allclose(curves.shuffled.means[:, 0, 2, 0], torch.stack(expected).numpy(), atol=1e-5)
    assert np.abs(curves.own.means - curves.shuffled.means).min() > 1e-3


def test_batches_merged_equal_one_batch() -> None:
    lens = Lens(tiny_model())
    meta_run, control_run = same_text(META_RUN * 2, CONTROL_RUN * 2)

    def measure(rows: list[int], documents: list[int]) -> ExcessCosine:
        return measure_excess_cosine(
            lens,
            meta_run[rows],
            control_run[rows],
            documents=documents,
            calibrations=[],
            seed=0,
            distances=DISTANCES,
            variants=("raw",),
        )

    # two documents a batch, so that the other document is the same whatever the seed
    merged = ExcessCosine.merge([measure([0, 1], [0, 1]), measure([3, 4], [0, 1])])
    first, second = (measure(rows, [0, 1]) for rows in ([0, 1], [3, 4]))
    np.testing.assert_allclose(merged.over_both.sums, first.over_both.sums + second.over_both.sums, atol=1e-9)
    assert isinstance(merged.meta, CosineCurves)
    np.testing.assert_array_equal(merged.meta.own.counts, first.meta.own.counts + second.meta.own.counts)


def test_control_of_another_text_is_refused() -> None:
    lens = Lens(tiny_model())
    meta_run, control_run = same_text(META_RUN, CONTROL_RUN)
    changed = control_run.clone()
    changed[0, 1] = (changed[0, 1] + 1) % NUM_TEXT_TOKENS
    measure = lambda control: measure_excess_cosine(  # noqa: E731 - two calls that differ in one argument
        lens, meta_run, control, documents=range(3), calibrations=[], seed=0, variants=("raw",)
    )
    measure(control_run)
    with pytest.raises(UsageError, match="another text"):
        measure(changed)
    with pytest.raises(UsageError, match="other numbers"):
        measure(control_run[:, :-1])


def test_calibration_equals_the_moments_of_all_real_tokens() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xx_xxxxx", "xxx_x_..")
    batches = [{"input_ids": row[None], "attention_mask": attention_mask_of(row[None])} for row in ids]
    calibrations = calibrate(lens, batches)
    states = capture_residuals(lens, ids, attention_mask=attention_mask_of(ids))
    is_meta, is_text = ids == META, (ids != META) & attention_mask_of(ids).bool()
    assert len(calibrations) == 3
    for calibration, layer in zip(calibrations, states, strict=True):
        assert (calibration.text.count, calibration.meta.count) == (11, 3)
        torch.testing.assert_close(calibration.text.mean.float(), layer[is_text].mean(0), atol=1e-5, rtol=1e-5)
        expected = layer[is_meta].std(0, correction=0)
        torch.testing.assert_close(calibration.meta.deviation.float(), expected, atol=1e-5, rtol=1e-4)


def test_calibration_without_text_is_refused() -> None:
    with pytest.raises(UsageError, match="no batch"):
        calibrate(Lens(tiny_model()), [])


def test_plain_gpt2_has_cosines_of_its_ordinary_tokens() -> None:
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    lens = Lens(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    curves = measure_cosines(
        lens,
        ids,
        select_pairs(mask, mask, DISTANCES),
        documents=[0, 1],
        partners=torch.tensor([1, 0]),
        calibrations=calibrate(lens, [{"input_ids": ids}]),
        distances=DISTANCES,
    )
    states = capture_residuals(lens, ids)[1]
    expected = torch.cosine_similarity(states[:, 4:], states[:, :-4], dim=-1).mean(1)
    np.testing.assert_allclose(curves.own.means[:, 0, 1, 2], expected.numpy(), atol=1e-5)
    assert curves.own.sums.shape == (2, 4, 3, 3)
