"""What the causal measures say of models whose cause is known, and that they change nothing where nothing differs."""

from typing import Any

import numpy as np
import pytest
import torch

from circuits import META as CIRCUIT_META
from circuits import build_circuit, hand_made_pairs
from metatokens.analysis.causal.eviction import Condition, measure_recall_after_eviction
from metatokens.analysis.causal.patching import (
    DIRECTIONS,
    PATHS,
    STATES,
    Blocked,
    KnockOut,
    Patch,
    block_paths,
    interchange,
    knock_out_meta_attention,
    knock_out_on_text,
    list_knock_outs,
    matched_positions,
    patch_map,
)
from metatokens.analysis.causal.policies import AlwaysKept
from metatokens.analysis.inputs.pairs import MinimalPair, make_minimal_pairs
from metatokens.analysis.inputs.scores import Ratio, Scores
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
    "meta": {
        ("direct", 0): 1,
        ("meta", 0): 0,
        ("meta", 1): 0,
        ("direct+meta", 0): 0,
        ("writing", 0): 0,
        ("writing", 1): 1,
        ("meta branch", 0): 1,
        ("direct+meta+detour", 0): 0,
    },
    "direct": {
        ("direct", 0): 0,
        ("direct", 1): 0,
        ("meta", 0): 1,
        ("direct+meta", 0): 0,
        ("writing", 0): 1,
        ("meta branch", 0): 1,
        ("direct+meta+detour", 0): 0,
    },
    "branch": {
        ("direct", 0): 1,
        ("meta", 0): 0,
        ("writing", 0): 0,
        ("meta branch", 0): 0,
        ("meta branch", 1): 1,
        ("direct+meta branch", 0): 0,
    },
}


def random_lens(**changes: Any) -> Lens:
    return Lens(tiny_model(**changes))


def random_pair(picture: str, item: int, question: int, seed: int = 0) -> MinimalPair:
    (ids,) = tokens(picture, seed=seed).numpy()
    corrupt = ids.copy()
    corrupt[item] = (ids[item] + 1) % 19
    return MinimalPair(ids, corrupt, 3, 5, np.array([item]), np.flatnonzero(ids == META), question)


RAGGED = [
    random_pair("xxx_xxx_xx_xxx", 1, 11, seed=1),
    random_pair("_xxxx_xx", 2, 6, seed=2),
    random_pair("xxxxx_xxxxx_xxxx__xx", 4, 18, seed=3),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("circuit", "state", "window"), PATCHED)
def test_patched_states_carry_the_answer_where_the_circuit_holds_it(circuit, state, window, direction):
    result = interchange(
        Lens(build_circuit(circuit)), hand_made_pairs(), states=(state,), directions=(direction,), windows=(window,)
    )
    effects = [result.effect(Patch(state, direction, window, site)).estimate for site in range(3)]
    assert effects == pytest.approx(PATCHED[circuit, state, window], abs=1e-6)


@pytest.mark.parametrize("circuit", ["meta", "direct", "branch"])
def test_ordinary_tokens_carry_nothing_and_the_last_one_all_at_the_end(circuit):
    result = interchange(
        Lens(build_circuit(circuit)), hand_made_pairs(), states=("ordinary", "last"), windows=(1,), batch_size=3
    )
    for direction in DIRECTIONS:
        effects = {
            state: [result.effect(Patch(state, direction, 1, site)).estimate for site in range(3)]
            for state in ("ordinary", "last")
        }
        assert effects["ordinary"] == pytest.approx([0, 0, 0], abs=1e-6)
        assert effects["last"] == pytest.approx([0, 0, 1], abs=1e-6)
    assert (result.clean.accuracy == 1).all()
    assert (result.corrupt.accuracy == 0).all()
    assert result.clean.logit_difference == pytest.approx(-result.corrupt.logit_difference, abs=1e-4)


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
    effects = interchange(lens, [pair], states=("item", "last"), directions=("denoise",), windows=(1,))
    for site in range(3):
        for state, position in (("item", item), ("last", -1)):
            expected = effects.effect(Patch(state, "denoise", 1, site)).estimate
            assert found[site, position] == pytest.approx(expected, abs=1e-4)


def test_map_of_patches_of_equal_prompts_is_unknown():
    pair = RAGGED[0]
    assert np.isnan(patch_map(random_lens(), pair._replace(corrupt=pair.clean))).all()


@pytest.mark.parametrize("circuit", KEPT)
def test_blocked_paths_leave_what_the_circuit_does_not_use(circuit):
    result = block_paths(Lens(build_circuit(circuit)), hand_made_pairs())
    for (paths, first_layer), share in KEPT[circuit].items():
        assert result.kept(paths, first_layer).estimate == pytest.approx(share, abs=1e-6), (paths, first_layer)
        accuracy = result.scores[Blocked(paths, first_layer)].accuracy
        assert (accuracy == 1).all() if share else (accuracy < 1).all()
    assert result.interaction(0) == pytest.approx(np.zeros(4), abs=1e-4)


def test_the_interaction_is_what_either_path_alone_could_do():
    result = block_paths(Lens(build_circuit("either")), hand_made_pairs(), first_layers=(0,))
    for path in ("direct", "meta"):
        assert result.kept(path, 0).estimate > 0.8
    assert result.kept("direct+meta", 0).estimate == pytest.approx(0, abs=1e-6)
    assert (result.interaction(0) > 0.6 * result.scores[Blocked("none", 0)].logit_difference).all()


def test_meta_attention_knocked_out_matters_where_it_carries_the_answer():
    lens = Lens(build_circuit("branch"))
    outs = [KnockOut("zero", (0,)), KnockOut("zero", (1,)), KnockOut("zero", (0, 1)), KnockOut("mean", (0,))]
    outs += [KnockOut("older", (0,), 0), KnockOut("older", (0,), 1), KnockOut("older", (1,), 0)]
    result = knock_out_meta_attention(lens, hand_made_pairs(), knock_outs=outs, batch_size=3)
    full = result.full.logit_difference
    left = {out: scores.logit_difference / full for out, scores in result.knocked_out.items()}
    for out, share in zip(outs, (0, 1, 0, 0, 0, 1, 1), strict=True):
        assert left[out] == pytest.approx(np.full(4, share), abs=1e-5), out
        assert (result.loss(out) > 1e-3).all() if share == 0 else (abs(result.loss(out)) < 1e-6).all()


@pytest.mark.parametrize(
    ("circuit", "right"), [("meta", {"meta": 1, "window": 0, "slots": 0}), ("direct", {"meta": 0, "window": 0})]
)
def test_recall_survives_the_eviction_of_what_the_circuit_does_not_read(circuit, right):
    policies = ("window", "meta", "slots", "random", "heavy_hitters")
    result = measure_recall_after_eviction(
        Lens(build_circuit(circuit)),
        hand_made_pairs(),
        meta_token_id=CIRCUIT_META,
        policies=policies,
        budgets=(3 / 7, 1.0),
        always_kept=AlwaysKept(sinks=1, newest=1),
    )
    assert (result.full.accuracy == 1).all()
    for policy in policies:
        whole = result.kept[Condition(policy, 1.0)]
        assert (whole.logit_difference == result.full.logit_difference).all()
    for policy, share in right.items():
        left = result.kept[Condition(policy, 3 / 7)].logit_difference / result.full.logit_difference
        assert left == pytest.approx(np.full(4, share), abs=1e-6), policy


@pytest.mark.parametrize("changes", [{}, {"position_encoding": "learned"}, {"attn_implementation": "eager"}])
def test_states_of_the_same_prompt_change_no_bit(changes):
    pairs = [pair._replace(corrupt=pair.clean) for pair in RAGGED]
    result = interchange(random_lens(**changes), pairs, batch_size=2)
    assert len(result.patched) == len(STATES) * 2 * 2 * 3
    for scores in result.patched.values():
        assert (scores.logit_difference == result.clean.logit_difference).all()
        assert (scores.cross_entropy == result.clean.cross_entropy).all()


def test_the_item_patched_where_it_enters_is_the_other_run():
    result = interchange(random_lens(), RAGGED, states=("item",), windows=(1,))
    for direction in DIRECTIONS:
        effect = result.effect(Patch("item", direction, 1, 0))
        assert effect.numerators == pytest.approx(effect.denominators, abs=1e-5)


def test_with_every_path_cut_nothing_of_the_item_reaches_the_answer():
    result = block_paths(random_lens(), RAGGED, first_layers=(0,))
    nothing = result.scores[Blocked("direct+meta+detour", 0)].logit_difference
    assert nothing == pytest.approx(np.zeros(3), abs=1e-6)
    for paths in PATHS:
        if paths != "direct+meta+detour":
            assert (abs(result.scores[Blocked(paths, 0)].logit_difference) > 1e-4).all(), paths
    assert set(result.scores) == {Blocked(paths, 0) for paths in PATHS}


def test_pairs_in_a_batch_score_as_they_do_alone():
    lens = random_lens()
    for measure, field in (
        (lambda pairs, n: interchange(lens, pairs, directions=("noise",), windows=(1,), batch_size=n), "patched"),
        (lambda pairs, n: block_paths(lens, pairs, first_layers=(1,), batch_size=n), "scores"),
        (
            lambda pairs, n: knock_out_meta_attention(
                lens, pairs, batch_size=n, knock_outs=[k for k in list_knock_outs(lens) if k.kind != "mean"]
            ),
            "knocked_out",
        ),
    ):
        together = getattr(measure(RAGGED, 3), field)
        in_parts = getattr(measure(RAGGED, 2), field)
        alone = [getattr(measure([pair], 1), field) for pair in RAGGED]
        for key, scores in together.items():
            one_by_one = np.concatenate([part[key].logit_difference for part in alone])
            assert scores.logit_difference == pytest.approx(one_by_one, abs=1e-4), key
            assert in_parts[key].logit_difference == pytest.approx(one_by_one, abs=1e-4), key


def test_zeroed_branch_is_a_model_without_it():
    model = tiny_model()
    without = MetaTokenForCausalLM(type(model.config)(**{**model.config.to_dict(), "meta_attention_layers": "none"}))
    without.load_state_dict(model.state_dict(), strict=False)
    result = knock_out_meta_attention(Lens(model), RAGGED, knock_outs=[KnockOut("zero", (0, 1))])
    plain = block_paths(Lens(without.eval()), RAGGED, paths=("none",), first_layers=(0,))
    expected = plain.scores[Blocked("none", 0)]
    assert result.knocked_out[KnockOut("zero", (0, 1))].cross_entropy == pytest.approx(expected.cross_entropy, abs=1e-4)


@pytest.mark.parametrize("loss_policy", ["skip", "retarget"])
def test_knock_outs_on_text_cost_what_the_loss_of_the_changed_model_says(loss_policy):
    model = tiny_model(loss_policy=loss_policy)
    lens = Lens(model)
    rows = [tokens(picture, seed=5) for picture in ("xxx_xxx_xx_xxx", "xxxxxxx", "_x_xx")]
    result = knock_out_on_text(lens, [row[0].numpy() for row in rows])
    assert set(result.rises) == set(list_knock_outs(lens))
    plain = [float(lens(row, labels=row).loss) for row in rows]
    assert result.full == pytest.approx(plain, abs=1e-6)
    with lens.edit(edits.scale("blocks.1.hook_meta_out", 0.0)):
        zeroed = [float(lens(row, labels=row).loss) for row in rows]
    assert result.rises[KnockOut("zero", (1,))] == pytest.approx(np.subtract(zeroed, plain), abs=1e-6)
    outputs = []
    for row in (rows[0], rows[2]):
        with lens.capture(["blocks.0.hook_meta_out"], at=row == META) as captured:
            lens(row)
        outputs.append(captured["blocks.0.hook_meta_out"])
    mean = torch.cat(outputs).mean(0)
    with lens.edit(edits.replace("blocks.0.hook_meta_out", mean, at=rows[0] == META)):
        averaged = float(lens(rows[0], labels=rows[0]).loss)
    assert result.rises[KnockOut("mean", (0,))][0] == pytest.approx(averaged - plain[0], abs=1e-5)
    for knock_out, losses in result.rises.items():
        assert losses[1] == 0  # a text without meta-tokens
        # more than there are; or the last block's own meta-tokens, whose outputs that policy does not use
        is_idle = knock_out.num_kept == 4 or (loss_policy == "retarget" and knock_out.layers == (1,))
        assert (losses[0] == 0) == is_idle


def test_more_meta_tokens_in_sight_than_there_are_cut_nothing():
    lens = random_lens()
    result = knock_out_meta_attention(lens, RAGGED, knock_outs=[KnockOut("older", (0, 1), n) for n in (0, 9)])
    assert (result.loss(KnockOut("older", (0, 1), 9)) == 0).all()
    assert (result.loss(KnockOut("older", (0, 1), 0)) != 0).any()


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
    patched = interchange(lens, pairs, windows=(1,), batch_size=4)
    assert patched.effect(Patch("item", "denoise", 1, 0)).estimate == pytest.approx(1, abs=1e-4)
    assert patched.effect(Patch("last", "noise", 1, 2)).estimate == pytest.approx(1, abs=1e-4)
    assert block_paths(lens, pairs).kept("direct+meta+detour", 0).estimate == pytest.approx(0, abs=1e-4)
    assert len(knock_out_meta_attention(lens, pairs).knocked_out) == len(list_knock_outs(lens)) == 12


def test_plain_model_has_paths_but_no_branch():
    lens = random_lens(meta_attention_layers="none")
    assert {key.paths for key in block_paths(lens, RAGGED).scores} == {name for name in PATHS if "branch" not in name}
    with pytest.raises(UsageError, match="no meta branch in this model, found 'meta branch'"):
        block_paths(lens, RAGGED, paths=("meta branch",))
    with pytest.raises(UsageError, match="knock-out of meta-attention"):
        knock_out_meta_attention(lens, RAGGED)


def test_scores_are_those_of_the_logits():
    logits = torch.tensor([[1.0, 3.0, 0.0, 9.0], [2.0, 1.0, 0.0, 9.0]], dtype=torch.float64)
    scores = Scores.of_logits(logits, torch.tensor([1, 1]), torch.tensor([0, 2]), meta_token_id=3)
    assert scores.logit_difference.tolist() == [2, 1]
    assert scores.accuracy.tolist() == [1, 0]
    assert scores.cross_entropy == pytest.approx(-logits.log_softmax(-1)[:, 1].numpy(), abs=1e-6)
    assert Ratio(np.array([1.0, 3.0]), np.array([-2.0, 6.0])).estimate == 1


def test_a_mistake_is_one_line():
    lens = random_lens()
    with pytest.raises(UsageError, match="window of sites: expected an odd number, found 2"):
        interchange(lens, RAGGED, windows=(2,))
    with pytest.raises(UsageError, match="paths to cut"):
        block_paths(lens, RAGGED, paths=("indirect",))
    encoder = word_encoder()
    special = {"encoder": encoder, "meta_token_id": encoder.vocab_size, "seed": 0}
    plain = make_minimal_pairs(
        ListRecallTask(meta_places=NoPlaces()), Difficulty(size=(2, 4), prompt_tokens=(10, 60)), pairs=2, **special
    )
    with pytest.raises(UsageError, match="a meta-token behind the item, found none of 2"):
        interchange(lens, plain)
