"""Cut paths cost what the circuit sends through them."""

import numpy as np
import pytest

from circuits import RAGGED, build_circuit, hand_made_pairs, random_lens, task_lens, task_pairs
from metatokens.analysis.causal.paths import PATHS, block_paths, interaction_of
from metatokens.analysis.inputs.scores import Scores
from metatokens.lens import Lens

KEPT = {
    "meta": {"direct cut": 1, "meta cut": 0, "both cut": 0, "meta-attention off": 1, "all paths cut": 0},
    "direct": {"direct cut": 0, "meta cut": 1, "both cut": 0, "meta-attention off": 1, "all paths cut": 0},
    "branch": {"direct cut": 1, "meta cut": 0, "meta-attention off": 0, "direct cut, meta-attention off": 0},
}


def kept_of(scores: dict[str, Scores], condition: str) -> float:
    """Return the share of the logit difference that is left with some paths cut."""
    return float(scores[condition].logit_difference.sum() / scores["full"].logit_difference.sum())


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


def test_with_every_path_cut_nothing_of_the_item_reaches_the_answer():
    scores = block_paths(random_lens(), RAGGED)
    assert scores["all paths cut"].logit_difference == pytest.approx(np.zeros(3), abs=1e-6)
    assert scores.keys() == PATHS.keys()
    for condition in PATHS.keys() - {"all paths cut"}:
        assert (abs(scores[condition].logit_difference) > 1e-4).all(), condition


def test_pairs_in_a_batch_score_as_they_do_alone():
    lens = random_lens()
    together, in_parts = block_paths(lens, RAGGED, batch_size=3), block_paths(lens, RAGGED, batch_size=2)
    alone = [block_paths(lens, [pair]) for pair in RAGGED]
    for key, found in together.items():
        one_by_one = np.concatenate([part[key].logit_difference for part in alone])
        assert found.logit_difference == pytest.approx(one_by_one, abs=1e-4), key
        assert in_parts[key].logit_difference == pytest.approx(one_by_one, abs=1e-4), key


def test_pairs_of_a_task_are_at_chance_with_every_path_cut():
    assert kept_of(block_paths(task_lens(), task_pairs()), "all paths cut") == pytest.approx(0, abs=1e-4)


def test_plain_model_has_paths_but_no_branch():
    scores = block_paths(random_lens(meta_attention_layers="none"), RAGGED)
    assert scores.keys() == {name for name in PATHS if "meta-attention off" not in name}
