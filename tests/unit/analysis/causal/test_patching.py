"""Patched states move the answer where the circuit holds it, and change nothing where nothing differs."""

from typing import Any

import numpy as np
import pytest
import torch

from circuits import RAGGED, build_circuit, hand_made_pairs, random_lens, random_pair, task_lens, task_pairs
from metatokens.analysis.causal.patching import (
    DIRECTIONS,
    STATES,
    WINDOWS,
    Patch,
    interchange,
    matched_positions,
    patch_map,
)
from metatokens.analysis.inputs.scores import stack_pairs
from metatokens.lens import Lens, edits

# by site: what enters block 0, what leaves it, what leaves block 1
PATCHED = {
    ("meta", "meta", 1): [0, 1, 0],
    ("meta", "item", 1): [1, 0, 0],
    ("meta", "meta", 3): [1, 1, 1],
    ("meta", "item", 3): [1, 1, 0],
    ("direct", "meta", 1): [0, 0, 0],
    ("direct", "item", 1): [1, 1, 0],
    ("direct", "meta", 3): [0, 0, 0],
    ("direct", "item", 3): [1, 1, 1],
    ("branch", "meta", 1): [0, 1, 0],
    ("branch", "item", 1): [1, 0, 0],
}


# the positions of `build_circuit` where each site holds the item
HOLDERS = {"meta": (2, 4, 7), "direct": (2, 2, 7), "branch": (2, 6, 7)}


def effect_of(effects: dict[Patch, np.ndarray], *patch: Any) -> float:
    """Return a ratio of means over pairs."""
    moved, way = effects[Patch(*patch)].sum(axis=0)
    return float(moved / way)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("circuit", "state", "window"), PATCHED)
def test_patched_states_carry_the_answer_where_the_circuit_holds_it(circuit, state, window, direction):
    effects = interchange(Lens(build_circuit(circuit)), hand_made_pairs())
    found = [effect_of(effects, state, direction, window, site) for site in range(3)]
    assert found == pytest.approx(PATCHED[circuit, state, window], abs=1e-6)


@pytest.mark.parametrize("circuit", ["meta", "direct", "branch"])
def test_ordinary_tokens_carry_nothing_and_the_last_one_all_at_the_end(circuit):
    effects = interchange(Lens(build_circuit(circuit)), hand_made_pairs(), batch_size=3)
    for direction in DIRECTIONS:
        for state, expected in (("ordinary", [0, 0, 0]), ("last", [0, 0, 1])):
            found = [effect_of(effects, state, direction, 1, site) for site in range(3)]
            assert found == pytest.approx(expected, abs=1e-6)


def test_the_way_of_a_patch_is_between_the_two_prompts_scored_towards_the_clean_answer():
    lens, pairs = Lens(build_circuit("meta")), hand_made_pairs()
    batch = stack_pairs(pairs)
    clean, corrupt = batch.score(lens, batch.clean), batch.score(lens, batch.corrupt)
    assert (clean.accuracy == 1).all()
    assert (corrupt.accuracy == 0).all()
    assert clean.logit_difference == pytest.approx(-corrupt.logit_difference, abs=1e-4)
    way = clean.logit_difference - corrupt.logit_difference
    for patch, effect in interchange(lens, pairs).items():
        assert (effect[:, 1] == (way if patch.direction == "denoise" else -way)).all()


@pytest.mark.parametrize(("circuit", "holders"), HOLDERS.items())
def test_map_of_patches_shows_where_the_circuit_holds_the_item(circuit, holders):
    expected = np.zeros((3, 8))
    expected[range(3), holders] = 1
    for pair in hand_made_pairs():
        assert patch_map(Lens(build_circuit(circuit)), pair) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pair", RAGGED)
def test_map_of_patches_is_that_of_each_patch_alone(pair):
    lens = random_lens()
    found = patch_map(lens, pair, batch_size=3)
    assert found.shape == (3, len(pair.clean))
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    clean, corrupt = (torch.from_numpy(ids)[None] for ids in (pair.clean, pair.corrupt))

    def difference(ids):
        logits = lens(ids).logits[0, -1].double()
        return float(logits[pair.answer] - logits[pair.foil])

    base, source = difference(corrupt), difference(clean)
    for site, name in enumerate(names):
        with lens.capture([name]) as captured:
            lens(clean)
        for position in range(len(pair.clean)):
            at = torch.arange(len(pair.clean))[None] == position
            with lens.edit(edits.replace(name, captured[name][0][at[0]], at=at)):
                share = (difference(corrupt) - base) / (source - base)
            assert found[site, position] == pytest.approx(share, abs=1e-3)
    (item,) = pair.item_positions
    assert found[0, item] == pytest.approx(1, abs=1e-4)
    assert (found[:, :item] == 0).all()
    effects = interchange(lens, [pair])
    for site in range(3):
        for state, position in (("item", item), ("last", -1)):
            expected = effect_of(effects, state, "denoise", 1, site)
            assert found[site, position] == pytest.approx(expected, abs=1e-4)


def test_map_of_patches_of_equal_prompts_is_unknown():
    pair = RAGGED[0]
    assert np.isnan(patch_map(random_lens(), pair._replace(corrupt=pair.clean))).all()


@pytest.mark.parametrize("changes", [{}, {"position_encoding": "learned"}, {"attn_implementation": "eager"}])
def test_states_of_the_same_prompt_change_no_bit(changes):
    pairs = [pair._replace(corrupt=pair.clean) for pair in RAGGED]
    effects = interchange(random_lens(**changes), pairs, batch_size=2)
    assert len(effects) == len(STATES) * len(DIRECTIONS) * len(WINDOWS) * 3
    for effect in effects.values():
        assert (effect == 0).all()


def test_the_item_patched_where_it_enters_is_the_other_run():
    effects = interchange(random_lens(), RAGGED)
    for direction in DIRECTIONS:
        moved, way = effects[Patch("item", direction, 1, 0)].T
        assert moved == pytest.approx(way, abs=1e-5)


def test_matched_positions_are_as_many_ordinary_tokens_near_the_metas():
    pair = random_pair("x_xxx_xx__xxx_xx", 3, 10)
    # metas behind the item at 5, 8, 9 and 13; the earlier of two equally near
    assert matched_positions(pair).tolist() == [4, 7, 10, 12]
    crowded = random_pair("xx___x_x", 1, 7)
    assert matched_positions(crowded).tolist() == [5]
    for drawn in task_pairs():
        chosen = matched_positions(drawn)
        assert len(chosen) == len(drawn.later_meta_positions)
        assert not set(chosen) & {*drawn.meta_positions, *drawn.item_positions, len(drawn.clean) - 1}


def test_pairs_in_a_batch_score_as_they_do_alone():
    lens = random_lens()
    together, in_parts = interchange(lens, RAGGED, batch_size=3), interchange(lens, RAGGED, batch_size=2)
    alone = [interchange(lens, [pair]) for pair in RAGGED]
    for key, found in together.items():
        one_by_one = np.concatenate([part[key][:, 0] for part in alone])
        assert found[:, 0] == pytest.approx(one_by_one, abs=1e-4), key
        assert in_parts[key][:, 0] == pytest.approx(one_by_one, abs=1e-4), key


def test_pairs_of_a_task_are_patched_from_end_to_end():
    effects = interchange(task_lens(), task_pairs(), batch_size=4)
    assert effect_of(effects, "item", "denoise", 1, 0) == pytest.approx(1, abs=1e-4)
    assert effect_of(effects, "last", "noise", 1, 2) == pytest.approx(1, abs=1e-4)
