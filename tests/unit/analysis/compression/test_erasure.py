"""Sampled states against single forward passes, erasure on circuits whose cause is known, and recall by size."""

import numpy as np
import pytest
import torch
from metatokens.analysis.compression.curves import measure_compression
from metatokens.analysis.probing import fit_erasers, measure_capacity, measure_erasure, measure_probes, meta_states
from metatokens.analysis.recording import Findings

from circuits import BOS, META, QUESTION_AT, WRITER_AT, build_circuit, hand_made_pairs
from metatokens.analysis.inputs.labelled_states import Sample, Samples, collect_samples, draw_samples, sample_of
from metatokens.config.analysis import AnalysisConfig, ProbeConfig, TaskSubject
from metatokens.config.tasks import Difficulty, ListRecallTask
from metatokens.errors import UsageError
from metatokens.lens import Lens
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
    measure_erasure(circuit_lens(circuit), circuit_samples(), CONFIG, findings)
    loss, accuracy = (
        next(r.value for r in findings.records if r.metric == metric and r.at == {"erased": "answer", "layer": 0})
        for metric in ("erasure_loss", "erasure_accuracy")
    )
    assert (loss > 0.5) == (accuracy < -0.5) == rise
    if not rise:
        assert abs(loss) < 1e-4


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_erased_states_have_the_same_mean_for_every_answer_and_those_of_shuffled_labels_do_not(layers):
    size = ENCODER.vocab_size
    changes = {"vocab_size": size + 2, "meta_token_id": size, "pad_token_id": size + 1, "eos_token_id": 0}
    lens = Lens(tiny_model(**changes, num_hidden_layers=4, max_position_embeddings=160))
    samples = draw_samples(lens, ENCODER.text_encoder, SUBJECT, seed=0)
    labels = np.arange(len(samples)) % 3

    def spread_of_means(erased: np.ndarray | None) -> list[float]:
        erasers = [] if erased is None else fit_erasers(lens, samples, erased, layers)
        spreads = []
        for place, layer in enumerate(layers):
            states, rows = meta_states(lens, samples, layer, erasers[: place + 1])
            means = np.stack([states[labels[rows] == label].mean(0) for label in range(3)])
            spreads.append(float(np.abs(means - means.mean(0)).max()))
        return spreads

    shuffled = np.random.Generator(np.random.PCG64(1)).permutation(labels)
    for erased, control, before in zip(
        spread_of_means(labels), spread_of_means(shuffled), spread_of_means(None), strict=True
    ):
        assert erased < 1e-4 < 0.1 * before
        assert control > 0.3 * before


def test_what_erasure_took_is_what_a_probe_of_the_same_states_no_longer_finds():
    findings = Findings(0)
    config = CONFIG.model_copy(update={"probe": ProbeConfig(num_seeds=1, learning_rate=0.05, minimum_documents=2)})
    samples = circuit_samples() * 4
    measure_erasure(circuit_lens("meta"), samples, config, findings)
    before, after = (
        next(r.value for r in findings.records if r.metric == "erasure_information" and r.at["erased"] == erased)
        for erased in ("nothing", "answer")
    )
    assert before > 0.3  # one of the three meta-tokens holds it
    assert abs(after) < 0.05


def test_answers_that_cannot_be_erased_or_compressed_are_an_error():
    with pytest.raises(UsageError, match="answers to erase"):
        measure_erasure(circuit_lens("meta"), circuit_samples()[::4], CONFIG, Findings(0))
    same = Samples({"last meta-token": np.zeros((9, 2), dtype=np.float32)}, {"answer": np.zeros(9, dtype=np.int64)})
    with pytest.raises(UsageError, match="answers: expected at least 2"):
        measure_compression(same, CONFIG, Findings(0))
    findings = Findings(0)
    measure_probes(same, CONFIG, findings)
    assert findings.not_run == ["probe of answer: it is the same in all instances"]


def test_an_instance_whose_answer_a_meta_token_predicts_is_left_out():
    for behind, kept in ((False, True), (True, False)):
        prompt = [5, META, 2, *([META] if behind else [6])]
        row = EncodedInstance(np.array([*prompt, 3]), np.full(5, -100), ((4, 5),), 3, ())
        assert (sample_of(row, META) is not None) == kept


def test_a_probe_reads_what_a_state_holds_and_labels_that_do_not_exist_are_left_out():
    generator = np.random.Generator(np.random.PCG64(0))
    answer = generator.integers(0, 3, 240)
    noise = generator.normal(size=(240, 6)).astype(np.float32)
    telling = np.concatenate([np.eye(3, dtype=np.float32)[answer] * 4, noise], axis=1)
    past = np.where(generator.random(240) < 0.3, -1, answer)
    rare = np.where(np.arange(240) < 20, answer, -1)
    labels = {
        "answer": answer,
        "the token before": past,
        "the token 16 back": rare,
        "meta-tokens so far": np.ones(240, dtype=np.int64),
    }
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
    assert ("token before it", "the token before") not in asked  # that is the same token
    assert any("20 instances that have it" in line for line in findings.not_run)
    (left,) = [r for r in findings.records if r.metric == "remaining_entropy" and r.at["state"] == "token before it"]
    assert left.high - left.low > 0.01
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
