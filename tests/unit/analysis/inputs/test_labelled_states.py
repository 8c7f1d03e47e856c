"""States of many instances against single forward passes, and the positions and labels that go with them."""

import numpy as np
import torch

from analysis_inputs import TASK
from metatokens.analysis.inputs.labelled_states import collect_samples, draw_samples, sample_of
from metatokens.config.analysis import AnalysisConfig
from metatokens.tasks.encoding import EncodedInstance
from task_drawing import word_encoder
from task_models import task_lens
from tiny_models import META

ENCODER = word_encoder()
STATES = AnalysisConfig(subject=TASK).states
FEW = ("last meta-token", "token before it")


def test_states_are_those_of_a_forward_pass_of_each_instance():
    lens = task_lens()
    samples = draw_samples(lens, ENCODER.text_encoder, TASK, seed=0)
    found = collect_samples(lens, ENCODER.text_encoder, samples, states=STATES, seed=0)
    meta, last_layer = lens.model.config.meta_token_id, len(lens.layout.blocks) - 1
    final, middle = f"blocks.{last_layer}.hook_resid_post", f"blocks.{last_layer // 2}.hook_resid_post"
    full_stop = ENCODER.ids(" .")[-1]
    for number in (0, 31, 59):
        row = samples[number].row
        answer = row.answer_spans[-1][0]
        prompt = row.input_ids[:answer]
        metas, text = np.flatnonzero(prompt == meta), np.flatnonzero(prompt != meta)
        before = text[text < metas[-1]]
        with lens.capture([final, middle]) as captured:
            lens(torch.from_numpy(prompt[None]))
        replaced = torch.from_numpy(np.where(prompt == meta, full_stop, prompt)[None])
        with lens.capture([final]) as without:
            lens(replaced)
        embeddings = lens.model.get_input_embeddings()(torch.from_numpy(prompt[before])).detach()
        expected = {
            "last meta-token": captured[final][0, metas[-1]],
            "last meta-token, halfway": captured[middle][0, metas[-1]],
            "ordinary token instead": without[final][0, metas[-1]],
            "token before it": captured[final][0, before[-1]],
            "last token": captured[final][0, answer - 1],
            "mean embedding": embeddings.mean(0),
        }
        for name, state in expected.items():
            np.testing.assert_allclose(found.states[name][number], state.numpy(), atol=2e-5, err_msg=name)
        assert found.labels["answer"][number] == row.input_ids[answer]
        assert found.labels["the token before"][number] == prompt[before[-1]]
        assert found.labels["the token 4 back"][number] == prompt[before[-4]]
        assert found.labels["meta-tokens so far"][number] == len(metas) - 1


def test_the_untrained_model_is_another_one_of_the_same_shape_and_seeded():
    lens = task_lens()
    samples = draw_samples(lens, ENCODER.text_encoder, TASK, seed=0)[:4]
    one, again = (
        collect_samples(lens, ENCODER.text_encoder, samples, states=("untrained",), seed=3).states for _ in range(2)
    )
    trained = collect_samples(lens, ENCODER.text_encoder, samples, states=FEW, seed=3).states
    assert list(one) == ["untrained"]
    assert list(trained) == list(FEW)
    np.testing.assert_array_equal(one["untrained"], again["untrained"])
    assert np.abs(one["untrained"] - trained["last meta-token"]).max() > 0.1


def test_an_instance_whose_answer_a_meta_token_predicts_is_left_out():
    for behind, kept in ((False, True), (True, False)):
        prompt = [5, META, 2, *([META] if behind else [6])]
        row = EncodedInstance(np.array([*prompt, 3]), np.full(5, -100), ((4, 5),), 3, (), 0.5)
        assert (sample_of(row, META) is not None) == kept
