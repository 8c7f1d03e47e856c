"""What is recorded of states and components, against the measures that it comes from and against known cases."""

import math

import numpy as np
import pytest
import torch
from metatokens.analysis.measuring import measure_distances
from metatokens.analysis.readouts import (
    measure_attribution,
    measure_decodability,
    measure_logit_lenses,
    measure_output_changes,
    measure_strengths,
    measure_text_attribution,
)
from metatokens.analysis.recording import Findings

from circuits import build_circuit, hand_made_pairs
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Subject
from metatokens.analysis.representations.logits import fit_affine_maps, measure_logit_lens, measure_outputs
from metatokens.config.analysis import AnalysisConfig, TextSubject
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.lens import Lens
from metatokens.lens.residuals import capture_residuals
from tiny_models import META, tiny_model

NUM_DOCUMENTS, LENGTH = 10, 40


def document(number: int, draw: int = 0) -> Document:
    generator = torch.Generator().manual_seed(1_000 * draw + number)
    text = torch.randint(1, META - 1, (1, LENGTH), generator=torch.Generator().manual_seed(number))
    places = 1 + torch.randperm(LENGTH - 1, generator=generator)[:6]
    ids = text.clone()
    ids[0, places] = META
    return Document(f"text {number}", ids, ids == META)


def text_subject() -> Subject:
    numbers = range(NUM_DOCUMENTS)
    calibration = [document(100 + number) for number in range(6)]
    return Subject([document(n) for n in numbers], calibration, [document(n, draw=1) for n in numbers], [])


def find(findings: Findings, metric: str, **at):
    return [r for r in findings.records if r.metric == metric and all(r.at.get(k) == v for k, v in at.items())]


def test_affine_maps_find_the_final_state_where_it_is_an_affine_function_of_an_earlier_one():
    # without attention and feed-forward a block adds its biases alone
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj, layer.meta_attn.o_proj):
                module.weight.zero_()
    lens = Lens(model)
    subject = text_subject()
    maps = fit_affine_maps(lens, [one.input_ids for one in subject.calibration])
    states = capture_residuals(lens, subject.documents[0].input_ids)
    assert len(maps) == len(states) - 1
    for to_final, layer_states in zip(maps, states[:-1], strict=True):
        text = ~subject.documents[0].is_meta[0]
        error = (to_final(layer_states[0]) - states[-1][0])[text].norm() / states[-1][0][text].norm()
        assert float(error) < 0.02
    with pytest.raises(UsageError, match="affine maps"):
        fit_affine_maps(lens, [subject.documents[0].input_ids])


def test_a_mapped_state_predicts_more_like_the_final_one_than_the_state_itself():
    lens, subject = Lens(tiny_model()), text_subject()
    maps = fit_affine_maps(lens, [one.input_ids for one in subject.calibration])
    one = subject.documents[0]
    plain = measure_logit_lens(lens, one.input_ids, at=~one.is_meta, documents=[0])
    mapped = measure_logit_lens(lens, one.input_ids, at=~one.is_meta, documents=[0], maps=maps)
    assert (mapped.divergence.mean[:-1] < plain.divergence.mean[:-1]).all()
    assert mapped.divergence.mean[-1] == plain.divergence.mean[-1] == 0


def test_the_token_right_before_is_decodable_from_its_own_embedding_and_not_from_a_meta_token_s():
    findings = Findings(0)
    measure_decodability(Lens(tiny_model()), text_subject(), seed=0, findings=findings)
    (own,) = find(findings, "decodability", state="token before it", layer=0, window=1)
    (meta,) = find(findings, "decodability", state="meta-token", layer=0, window=1)
    assert own.value > 0.5
    assert meta.value < 0.1  # all meta-tokens are one vector before the first block
    (rank,) = find(findings, "prefix_rank", state="meta-token", layer=0, window=1)
    (chance,) = find(findings, "prefix_rank_chance", state="meta-token", window=1)
    assert rank.value < 3 * chance.value
    assert not find(findings, "cka", state="meta-token", layer=0)
    (cka,) = find(findings, "cka", state="ordinary token", layer=1)
    assert cka.low < cka.value < cka.high
    assert {record.at["window"] for record in find(findings, "decodability")} == {1, 4}
    short = text_subject()
    cut = [Document(d.name, d.input_ids[:, :3], d.is_meta[:, :3]) for d in short.documents]
    with pytest.raises(UsageError, match="longer documents"):
        measure_decodability(Lens(tiny_model()), Subject(cut, [], [], []), seed=0, findings=findings)


def test_logit_lenses_are_recorded_by_state_layer_and_distance():
    lens, subject, findings = Lens(tiny_model()), text_subject(), Findings(0)
    measure_logit_lenses(lens, subject, findings=findings)
    per_document = [
        measure_logit_lens(lens, one.input_ids, at=one.is_meta, documents=[0]).reciprocal_rank.means[0, 1, 0]
        for one in subject.documents
    ]
    (record,) = find(findings, "reciprocal_rank", state="meta-token", read="state", layer=1, distance=1)
    assert record.value == pytest.approx(np.nanmean(per_document))
    assert {r.at["state"] for r in find(findings, "divergence")} == {"meta-token", "ordinary token"}
    assert {r.at["read"] for r in find(findings, "divergence")} == {"state", "mapped state"}


@pytest.mark.parametrize(("circuit", "layer"), [("meta", 1), ("direct", 1)])
def test_the_attention_that_writes_the_answer_has_the_whole_logit_difference(circuit, layer):
    lens, findings = Lens(build_circuit(circuit)), Findings(0)
    pairs = hand_made_pairs()
    measure_attribution(lens, pairs, findings=findings)
    total = sum(record.value for record in findings.records)
    (writes,) = find(findings, "attribution", component="attention", layer=layer)
    logits = [lens(torch.from_numpy(pair.clean[None])).logits[0, -1] for pair in pairs]
    differences = [float(row[pair.answer] - row[pair.foil]) for row, pair in zip(logits, pairs, strict=True)]
    assert total == pytest.approx(np.mean(differences), abs=1e-4)
    assert writes.value == pytest.approx(total, rel=1e-3)
    (meta,) = find(findings, "attribution", component="meta-attention", layer=0)
    assert meta.value == pytest.approx(0, abs=1e-4)


def test_shares_of_text_tokens_add_up_to_their_logits_over_the_mean():
    lens, subject, findings = Lens(tiny_model()), text_subject(), Findings(0)
    measure_text_attribution(lens, subject, findings=findings)
    expected = []
    for one in subject.documents:
        logits = lens(one.input_ids).logits[0, :-1]
        over_mean = logits.gather(1, one.input_ids[0, 1:, None])[:, 0] - logits.mean(-1)
        behind = (one.is_meta.long().cumsum(1) > 0)[0, 1:] & ~one.is_meta[0, 1:]
        expected.append(float(over_mean[behind].mean()))
    assert sum(record.value for record in findings.records) == pytest.approx(np.mean(expected), abs=1e-4)


def test_attention_by_distance_adds_up_to_all_of_it():
    findings = Findings(0)
    config = AnalysisConfig(subject=TextSubject(source="-"), documents=NUM_DOCUMENTS)
    measure_distances(Lens(tiny_model()), text_subject(), config, findings)
    assert {record.at["distance"] for record in findings.records} == {0, 1, 2, 4, 8, 16, 32}
    for layer in (0, 1):
        masses = [record.value for record in find(findings, "mass_by_distance", layer=layer)]
        assert sum(masses) == pytest.approx(1, abs=1e-5)
    (meta,) = find(findings, "mass_by_distance", layer=0, to="meta-tokens", distance=4)
    assert 0 < meta.low < meta.high < 1


def test_strength_of_a_branch_that_adds_nothing_is_zero():
    model, findings = tiny_model(), Findings(0)
    with torch.no_grad():
        model.model.layers[1].meta_attn.o_proj.weight.zero_()
        model.model.layers[1].meta_attn.o_proj.bias.zero_()
    measure_strengths(Lens(model), text_subject(), findings=findings)
    (silent,) = find(findings, "branch_strength", branch="meta-attention", layer=1)
    (speaks,) = find(findings, "branch_strength", branch="meta-attention", layer=0)
    assert silent.value == 0 < speaks.value


def test_changes_of_the_output_are_those_between_two_runs():
    lens, subject, findings = Lens(tiny_model()), text_subject(), Findings(0)
    measure_output_changes(lens, subject, findings=findings)
    drops = []
    for one in subject.documents:
        at = (one.is_meta.long().cumsum(1) > 0) & ~one.is_meta
        full = measure_outputs(lens, one.input_ids, at=at).cross_entropy
        with intervene(lens.model, [ZeroEmbedding()]):
            without = measure_outputs(lens, one.input_ids, at=at).cross_entropy
        drops.append(float((without - full).nanmean()))
    (record,) = find(findings, "loss_drop", place="text behind")
    assert record.value == pytest.approx(np.mean(drops), abs=1e-6)
    assert record.p_value is not None
    assert math.isfinite(find(findings, "max_logit_boost", place="meta-tokens")[0].value)
