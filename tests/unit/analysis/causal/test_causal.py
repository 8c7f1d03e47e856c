"""What the causal measures say of models whose cause is known, and that they change nothing where nothing differs."""

from typing import Any

import numpy as np
import pytest
import torch

from circuits import build_circuit, hand_made_pairs
from metatokens.analysis.causal.knockout import WHOLE, KnockOut, list_knock_outs, losses_on_text, score_knock_outs
from metatokens.analysis.causal.patching import (
    DIRECTIONS,
    STATES,
    WINDOWS,
    Patch,
    interchange,
    matched_positions,
    patch_map,
)
from metatokens.analysis.causal.paths import PATHS, block_paths
from metatokens.analysis.inputs.pairs import MinimalPair, make_minimal_pairs
from metatokens.analysis.inputs.scores import Scores, stack_pairs
from metatokens.config.tasks import Difficulty, ListRecallTask, NoPlaces
from metatokens.errors import UsageError
from metatokens.lens import Lens, edits
from metatokens.model import MetaTokenForCausalLM
from task_drawing import word_encoder
from tiny_models import META, tiny_model, tokens

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
KEPT = {
    "meta": {"direct cut": 1, "meta cut": 0, "both cut": 0, "meta-attention off": 1, "all paths cut": 0},
    "direct": {"direct cut": 0, "meta cut": 1, "both cut": 0, "meta-attention off": 1, "all paths cut": 0},
    "branch": {"direct cut": 1, "meta cut": 0, "meta-attention off": 0, "direct cut, meta-attention off": 0},
}


def random_lens(**changes: Any) -> Lens:
    return Lens(tiny_model(**changes))


def random_pair(picture: str, item: int, question: int, seed: int = 0) -> MinimalPair:
    (ids,) = tokens(picture, seed=seed).numpy()
    corrupt = ids.copy()
    corrupt[item] = (ids[item] + 1) % 19
    return MinimalPair(ids, corrupt, 3, 5, np.array([item]), np.flatnonzero(ids == META), question)


def effect_of(effects: dict[Patch, np.ndarray], *patch: Any) -> float:
    """Return a ratio of means over pairs."""
    moved, way = effects[Patch(*patch)].sum(axis=0)
    return float(moved / way)


def kept_of(scores: dict[str, Scores], condition: str) -> float:
    """Return the share of the logit difference that is left with some paths cut."""
    return float(scores[condition].logit_difference.sum() / scores["full"].logit_difference.sum())


def interaction_of(scores: dict[str, Scores]) -> np.ndarray:
    left = {condition: found.logit_difference for condition, found in scores.items()}
    return (left["direct cut"] - left["both cut"]) - (left["full"] - left["meta cut"])


RAGGED = [
    random_pair("xxx_xxx_xx_xxx", 1, 11, seed=1),
    random_pair("_xxxx_xx", 2, 6, seed=2),
    random_pair("xxxxx_xxxxx_xxxx__xx", 4, 18, seed=3),
]


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


# the positions of `build_circuit` where each site holds the item
HOLDERS = {"meta": (2, 4, 7), "direct": (2, 2, 7), "branch": (2, 6, 7)}


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


@pytest.mark.parametrize("circuit", KEPT)
def test_blocked_paths_leave_what_the_circuit_does_not_use(circuit):
    scores = block_paths(Lens(build_circuit(circuit)), hand_made_pairs())
    for condition, share in KEPT[circuit].items():
        assert kept_of(scores, condition) == pytest.approx(share, abs=1e-6), condition
        accuracy = scores[condition].accuracy
        assert (accuracy == 1).all() if share else (accuracy < 1).all()
    assert interaction_of(scores) == pytest.approx(np.zeros(4), abs=1e-4)


def test_the_interaction_is_what_either_path_alone_could_do():
    scores = block_paths(Lens(build_circuit("either")), hand_made_pairs())
    for condition in ("direct cut", "meta cut"):
        assert kept_of(scores, condition) > 0.8
    assert kept_of(scores, "both cut") == pytest.approx(0, abs=1e-6)
    assert (interaction_of(scores) > 0.6 * scores["full"].logit_difference).all()


def test_meta_attention_knocked_out_matters_where_it_carries_the_answer():
    lens = Lens(build_circuit("branch"))
    outs = [KnockOut("zero", (0,)), KnockOut("zero", (1,)), KnockOut("zero", (0, 1)), KnockOut("mean", (0,))]
    outs += [KnockOut("older", (0,), 0), KnockOut("older", (0,), 1), KnockOut("older", (1,), 0)]
    scores = score_knock_outs(lens, hand_made_pairs(), [WHOLE, *outs], batch_size=3)
    full = scores[WHOLE]
    for out, share in zip(outs, (0, 1, 0, 0, 0, 1, 1), strict=True):
        assert scores[out].logit_difference / full.logit_difference == pytest.approx(np.full(4, share), abs=1e-5), out
        rise = scores[out].cross_entropy - full.cross_entropy
        assert (rise > 1e-3).all() if share == 0 else (abs(rise) < 1e-6).all()


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


def test_with_every_path_cut_nothing_of_the_item_reaches_the_answer():
    scores = block_paths(random_lens(), RAGGED)
    assert scores["all paths cut"].logit_difference == pytest.approx(np.zeros(3), abs=1e-6)
    assert scores.keys() == PATHS.keys()
    for condition in PATHS.keys() - {"all paths cut"}:
        assert (abs(scores[condition].logit_difference) > 1e-4).all(), condition


def test_pairs_in_a_batch_score_as_they_do_alone():
    lens = random_lens()
    outs = [knock_out for knock_out in list_knock_outs(lens) if knock_out.kind != "mean"]
    for measure in (
        lambda pairs, n: {key: effect[:, 0] for key, effect in interchange(lens, pairs, batch_size=n).items()},
        lambda pairs, n: {key: left[0] for key, left in block_paths(lens, pairs, batch_size=n).items()},
        lambda pairs, n: {key: left[0] for key, left in score_knock_outs(lens, pairs, outs, batch_size=n).items()},
    ):
        together, in_parts = measure(RAGGED, 3), measure(RAGGED, 2)
        alone = [measure([pair], 1) for pair in RAGGED]
        for key, values in together.items():
            one_by_one = np.concatenate([part[key] for part in alone])
            assert values == pytest.approx(one_by_one, abs=1e-4), key
            assert in_parts[key] == pytest.approx(one_by_one, abs=1e-4), key


def test_the_mean_of_a_knock_out_is_over_the_meta_tokens_of_all_prompts():
    lens, name = random_lens(), "blocks.0.hook_meta_out"
    batch = stack_pairs(RAGGED)
    outputs = []
    for ids in (batch.clean, batch.corrupt):
        with lens.capture([name], at=batch.is_meta) as captured:
            lens(ids)
        outputs.append(captured[name])
    with lens.edit(edits.replace(name, torch.cat(outputs).mean(0), at=batch.is_meta)):
        expected = batch.score_both(lens).cross_entropy
    averaged = KnockOut("mean", (0,))
    found = score_knock_outs(lens, RAGGED, [averaged], batch_size=2)[averaged].cross_entropy
    assert found == pytest.approx(expected, abs=1e-5)


def test_zeroed_branch_is_a_model_without_it():
    model = tiny_model()
    without = MetaTokenForCausalLM(type(model.config)(**{**model.config.to_dict(), "meta_attention_layers": "none"}))
    without.load_state_dict(model.state_dict(), strict=False)
    zeroed = KnockOut("zero", (0, 1))
    found = score_knock_outs(Lens(model), RAGGED, [zeroed])[zeroed]
    expected = block_paths(Lens(without.eval()), RAGGED)["full"]
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-4)


@pytest.mark.parametrize("loss_policy", ["skip", "retarget"])
def test_knock_outs_on_text_cost_what_the_loss_of_the_changed_model_says(loss_policy):
    lens = Lens(tiny_model(loss_policy=loss_policy))
    rows = [tokens(picture, seed=5) for picture in ("xxx_xxx_xx_xxx", "xxxxxxx", "_x_xx")]
    losses = losses_on_text(lens, rows, [(), (1,)])
    plain = [float(lens(row, labels=row).loss) for row in rows]
    assert losses[()] == pytest.approx(plain, abs=1e-6)
    with lens.edit(edits.scale("blocks.1.hook_meta_out", 0.0)):
        zeroed = [float(lens(row, labels=row).loss) for row in rows]
    assert losses[(1,)] == pytest.approx(zeroed, abs=1e-6)
    assert losses[(1,)][1] == losses[()][1]  # a text without meta-tokens


def test_more_meta_tokens_in_sight_than_there_are_cut_nothing():
    lens = random_lens()
    all_of_them, none_of_them = KnockOut("older", (0, 1), 9), KnockOut("older", (0, 1), 0)
    scores = score_knock_outs(lens, RAGGED, [WHOLE, all_of_them, none_of_them])
    assert (scores[all_of_them].cross_entropy == scores[WHOLE].cross_entropy).all()
    assert (scores[none_of_them].cross_entropy != scores[WHOLE].cross_entropy).any()


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


def task_pairs() -> list[MinimalPair]:
    encoder, difficulty = word_encoder(), Difficulty(size=(2, 4), prompt_tokens=(10, 60))
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size, "seed": 0}
    return make_minimal_pairs(ListRecallTask(), difficulty, pairs=6, **special)


def test_pairs_of_a_task_run_through_all_measures():
    encoder = word_encoder()
    model = tiny_model(vocab_size=encoder.vocab_size + 2, meta_token_id=encoder.vocab_size, pad_token_id=None)
    lens, pairs = Lens(model), task_pairs()
    effects = interchange(lens, pairs, batch_size=4)
    assert effect_of(effects, "item", "denoise", 1, 0) == pytest.approx(1, abs=1e-4)
    assert effect_of(effects, "last", "noise", 1, 2) == pytest.approx(1, abs=1e-4)
    assert kept_of(block_paths(lens, pairs), "all paths cut") == pytest.approx(0, abs=1e-4)
    outs = list_knock_outs(lens)
    assert list(score_knock_outs(lens, pairs, outs)) == outs
    assert len(outs) == 12


def test_plain_model_has_paths_but_no_branch():
    lens = random_lens(meta_attention_layers="none")
    assert block_paths(lens, RAGGED).keys() == {name for name in PATHS if "meta-attention off" not in name}
    with pytest.raises(UsageError, match="knock-out of meta-attention"):
        list_knock_outs(lens)


def test_scores_are_those_of_the_logits():
    logits = torch.tensor([[1.0, 3.0, 0.0, 9.0], [2.0, 1.0, 0.0, 9.0]], dtype=torch.float64)
    scores = Scores.of_logits(logits, torch.tensor([1, 1]), torch.tensor([0, 2]), meta_token_id=3)
    assert scores.logit_difference.tolist() == [2, 1]
    assert scores.accuracy.tolist() == [1, 0]
    assert scores.cross_entropy == pytest.approx(-logits.log_softmax(-1)[:, 1].numpy(), abs=1e-6)


def test_pairs_without_a_meta_token_behind_the_item_are_refused():
    encoder = word_encoder()
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size, "seed": 0}
    plain = make_minimal_pairs(
        ListRecallTask(meta_places=NoPlaces()), Difficulty(size=(2, 4), prompt_tokens=(10, 60)), pairs=2, **special
    )
    with pytest.raises(ValueError, match="none of 2 minimal pairs has a meta-token behind its item"):
        interchange(random_lens(), plain)
