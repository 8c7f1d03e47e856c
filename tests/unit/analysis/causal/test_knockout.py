"""Meta-attention taken away costs what the circuit sends through it, and on text what the loss says."""

import numpy as np
import pytest
import torch

from analysis_inputs import records_of, task_inputs
from circuits import RAGGED, build_circuit, hand_made_pairs, random_lens, task_lens, task_pairs
from metatokens.analysis.causal.knockout import WHOLE, KnockOut, list_knock_outs, losses_on_text, score_knock_outs
from metatokens.analysis.causal.paths import block_paths
from metatokens.analysis.inputs.scores import stack_pairs
from metatokens.errors import UsageError
from metatokens.lens import Lens, edits
from metatokens.model import MetaTokenForCausalLM
from tiny_models import tiny_model, tokens


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


def test_pairs_in_a_batch_score_as_they_do_alone_but_for_the_mean_over_all():
    lens = random_lens()
    outs = [knock_out for knock_out in list_knock_outs(lens) if knock_out.kind != "mean"]
    together, in_parts = (score_knock_outs(lens, RAGGED, outs, batch_size=size) for size in (3, 2))
    alone = [score_knock_outs(lens, [pair], outs) for pair in RAGGED]
    for key, found in together.items():
        one_by_one = np.concatenate([part[key].logit_difference for part in alone])
        assert found.logit_difference == pytest.approx(one_by_one, abs=1e-4), key
        assert in_parts[key].logit_difference == pytest.approx(one_by_one, abs=1e-4), key


def test_every_knock_out_runs_on_pairs_of_a_task():
    lens = task_lens()
    outs = list_knock_outs(lens)
    assert list(score_knock_outs(lens, task_pairs(), outs)) == outs
    assert len(outs) == 12


def test_a_model_without_meta_attention_among_its_meta_tokens_is_refused():
    for changes in ({"meta_attention_layers": "none"}, {"meta_attention_over": "all"}):
        with pytest.raises(UsageError, match="knock-out of meta-attention"):
            list_knock_outs(random_lens(**changes))


def test_an_analysis_of_a_model_without_meta_attention_says_that_it_has_no_knock_out():
    inputs = task_inputs(tiny_model(meta_attention_layers="none"))
    assert records_of("knockout", inputs) == []
    assert inputs.skipped == [
        "causal: knock-out of meta-attention: expected a model with meta-attention over its meta-tokens, "
        "found one without; analyse another checkpoint"
    ]
