"""Sampled states against single forward passes, erasure on circuits whose cause is known, and recall by size."""

import numpy as np
import pytest
import torch

from circuits import BOS, QUESTION_AT, WRITER_AT, build_circuit, hand_made_pairs
from metatokens.analysis import Lens
from metatokens.analysis.probing import measure_capacity, measure_erasure, measure_probes
from metatokens.analysis.recording import Findings
from metatokens.analysis.sampled_states import Sample, Samples, collect_samples, draw_samples
from metatokens.config.analysis import AnalysisConfig, ProbeConfig, TaskSubject
from metatokens.config.tasks import Difficulty, ListRecallTask
from metatokens.errors import UsageError
from metatokens.tasks.encoding import EncodedInstance
from task_drawing import word_encoder
from tiny_models import tiny_model

ENCODER = word_encoder()
SUBJECT = TaskSubject(
    task=ListRecallTask(questions=1),
    difficulty=Difficulty(size=(2, 4), prompt_tokens=(20, 60)),
    fitted_instances=60,
)
CONFIG = AnalysisConfig(subject=SUBJECT, documents=8, probe=ProbeConfig(num_seeds=1, max_steps=20))
FEW = ("last meta-token", "token before it")


def task_lens() -> Lens:
    size = ENCODER.vocab_size
    return Lens(
        tiny_model(
            vocab_size=size + 2, meta_token_id=size, pad_token_id=size + 1, eos_token_id=0, max_position_embeddings=160
        )
    )


def circuit_lens(circuit) -> Lens:
    model = build_circuit(circuit)
    model.config.pad_token_id = BOS
    return Lens(model)


def circuit_samples() -> list[Sample]:
    """Return each hand-made prompt with its answer behind it, many times."""
    rows = []
    for pair in hand_made_pairs() * 6:
        ids = np.append(pair.clean, pair.answer)
        row = EncodedInstance(ids, np.full_like(ids, -100), ((len(pair.clean), len(ids)),), len(pair.clean), ())
        rows.append(Sample(row, int(pair.meta_positions[-1]), WRITER_AT + 1, QUESTION_AT))
    return rows


def test_states_are_those_of_a_forward_pass_of_each_instance():
    lens = task_lens()
    samples = draw_samples(lens, ENCODER.text_encoder, SUBJECT, seed=0)
    found = collect_samples(lens, ENCODER.text_encoder, samples, states=CONFIG.states, seed=0)
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
    samples = draw_samples(lens, ENCODER.text_encoder, SUBJECT, seed=0)[:4]
    one, again = (
        collect_samples(lens, ENCODER.text_encoder, samples, states=("untrained",), seed=3).states for _ in range(2)
    )
    trained = collect_samples(lens, ENCODER.text_encoder, samples, states=FEW, seed=3).states
    assert list(one) == ["untrained"]
    assert list(trained) == list(FEW)
    np.testing.assert_array_equal(one["untrained"], again["untrained"])
    assert np.abs(one["untrained"] - trained["last meta-token"]).max() > 0.1


@pytest.mark.parametrize(("circuit", "rise"), [("meta", True), ("direct", False)])
def test_erasure_costs_the_answer_where_the_circuit_reads_it_from_meta_tokens(circuit, rise):
    findings = Findings(0)
    measure_erasure(circuit_lens(circuit), circuit_samples(), findings)
    answer, shuffled = (
        next(r for r in findings.records if r.metric == "erasure_loss" and r.at == {"erased": name, "layer": 0})
        for name in ("answer", "shuffled")
    )
    assert (answer.value > 0.5) == rise
    if not rise:
        assert abs(answer.value) < 1e-4
        assert abs(shuffled.value) < 1e-4
    changed = next(r for r in findings.records if r.metric == "erasure_accuracy" and r.at["erased"] == "answer")
    assert (changed.value < -0.5) == rise


def test_one_answer_alone_cannot_be_erased():
    with pytest.raises(UsageError, match="answers to erase"):
        measure_erasure(circuit_lens("meta"), circuit_samples()[::4], Findings(0))


def test_a_probe_reads_what_a_state_holds_and_labels_that_do_not_exist_are_left_out():
    generator = np.random.Generator(np.random.PCG64(0))
    answer = generator.integers(0, 3, 240)
    noise = generator.normal(size=(240, 6)).astype(np.float32)
    telling = np.concatenate([np.eye(3, dtype=np.float32)[answer] * 4, noise], axis=1)
    past = np.where(generator.random(240) < 0.3, -1, answer)
    labels = {"answer": answer, "the token before": past, "meta-tokens so far": np.ones(240, dtype=np.int64)}
    samples = Samples({"last meta-token": telling, "token before it": noise, "mean embedding": noise}, labels)
    config = CONFIG.model_copy(
        update={"probe": ProbeConfig(num_seeds=1, learning_rate=0.05, max_steps=300, code_shares=(0.1, 0.5, 1.0))}
    )
    findings = Findings(0)
    measure_probes(samples, config, findings)

    def value(metric, state, target="answer"):
        (record,) = [r for r in findings.records if r.metric == metric and r.at == {"state": state, "target": target}]
        return record.value

    assert value("v_information", "last meta-token") > 0.9
    assert value("v_information", "last meta-token", "the token before") > 0.8
    assert abs(value("v_information", "token before it")) < 0.1
    assert value("remaining_entropy", "last meta-token") < 0.2
    assert value("compression", "last meta-token") > 2 > value("compression_of_shuffled", "last meta-token")
    asked = {(r.at["state"], r.at["target"]) for r in findings.records}
    assert ("mean embedding", "the token before") not in asked
    assert not any(target == "meta-tokens so far" for _, target in asked)  # one label is no question


def test_recall_by_size_goes_beyond_the_sizes_that_were_asked():
    findings = Findings(0)
    small = SUBJECT.model_copy(update={"difficulty": Difficulty(size=(2, 3), prompt_tokens=(20, 60))})
    measure_capacity(task_lens(), ENCODER.text_encoder, small, CONFIG, findings)
    assert [record.at["size"] for record in findings.records] == [2, 3, 4, 5, 6]
    assert all(record.num_documents == 8 for record in findings.records)
    narrow = SUBJECT.model_copy(update={"difficulty": Difficulty(size=(20, 20), prompt_tokens=(20, 60))})
    measure_capacity(task_lens(), ENCODER.text_encoder, narrow, CONFIG, findings)
    assert any("no prompt of these lengths" in line for line in findings.not_run)
