"""Accuracy on recall tasks: what counts as right is what greedy decoding would write."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from metatokens.config.finetuning import EvaluateConfig
from metatokens.config.schema import ModelConfig
from metatokens.config.tasks import CopyingTask, Difficulty, ListPointerTask, Task
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.errors import NumericError
from metatokens.evaluation.interventions import NoMetaAttention
from metatokens.evaluation.recall import count_right_answers, evaluate_recall, make_test_instances, report
from metatokens.model import MetaTokenForCausalLM
from metatokens.tasks.base import PieceEncoder
from metatokens.tasks.encoding import EncodedInstance
from metatokens.training.initialization import build_model

LENGTH = 300


@pytest.fixture(scope="module")
def encoder() -> PieceEncoder:
    return PieceEncoder(TextEncoder(train_tokenizer(["the cat sat on the mat"] * 3, 270)))


@pytest.fixture(scope="module")
def model(encoder: PieceEncoder) -> MetaTokenForCausalLM:
    """A model that answers by chance, and often with one of few tokens."""
    config = ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH)
    built = build_model(config, text_vocab_size=encoder.vocab_size, eos_token_id=0, seed=0).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)
    return built


def instances(encoder: PieceEncoder, task: Task, count: int = 24) -> list[EncodedInstance]:
    difficulty = Difficulty(size=(1, 2), prompt_tokens=(1, 220))
    special = {"meta_token_id": encoder.vocab_size, "seed": 0}
    return make_test_instances(task, difficulty, encoder=encoder, instances=count, **special)


@torch.no_grad()
def decode(model: MetaTokenForCausalLM, prompt: np.ndarray, length: int) -> list[int]:
    # of an untrained model, rows of the vocabulary that no token owns are as likely as others
    unowned = list(range(model.config.meta_token_id, model.config.vocab_size))
    options = {"do_sample": False, "eos_token_id": None, "suppress_tokens": unowned}
    output = model.generate(torch.from_numpy(prompt[None]), max_new_tokens=length, **options)
    return output[0, len(prompt) :].tolist()


def with_answer(row: EncodedInstance, answer: list[int]) -> EncodedInstance:
    """Return an instance whose true answer is another."""
    ((start, stop),) = row.answer_spans
    assert len(answer) == stop - start
    return row._replace(input_ids=np.concatenate([row.input_ids[:start], np.array(answer)]))


def test_an_answer_counts_as_right_where_greedy_decoding_writes_it(encoder: PieceEncoder, model: MetaTokenForCausalLM):
    rows = instances(encoder, CopyingTask())
    expected = []
    for index, row in enumerate(rows):
        ((start, stop),) = row.answer_spans
        written = decode(model, row.input_ids[:start], stop - start)
        wrong = (index % 3) - 1  # right, or wrong at its first or its last token
        if wrong >= 0:
            at = 0 if wrong == 0 else len(written) - 1
            written[at] = (written[at] + 1) % 200
        rows[index] = with_answer(row, written)
        expected.append(wrong < 0)
    counts = count_right_answers(model, rows, batch_size=5)
    assert counts.right_answers.tolist() == expected
    assert counts.tokens.tolist() == [row.answer_spans[0][1] - row.answer_spans[0][0] for row in rows]
    assert (counts.right_tokens[0::3] == counts.tokens[0::3]).all()
    assert (counts.right_tokens[2::3] == counts.tokens[2::3] - 1).all()


def test_batch_size_does_not_matter(encoder: PieceEncoder, model: MetaTokenForCausalLM):
    rows = instances(encoder, CopyingTask(questions=2))
    one, many = (count_right_answers(model, rows, batch_size=size) for size in (1, 24))
    for left, right in zip(dataclasses.astuple(one), dataclasses.astuple(many), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (one.answers == 2).all()


def test_a_choice_is_the_one_with_the_highest_probability(encoder: PieceEncoder, model: MetaTokenForCausalLM):
    rows = instances(encoder, ListPointerTask(num_lists=(2, 2)), count=8)
    assert len({len(choice) for row in rows for choice in row.choices}) > 1, "choices of several lengths"
    best = [max(row.choices, key=lambda choice: log_probability(model, row, choice)) for row in rows]
    right = count_right_answers(model, rows, batch_size=4).right_answers
    truth = [tuple(row.input_ids[slice(*row.answer_spans[0])].tolist()) for row in rows]
    assert right.tolist() == [float(a == b) for a, b in zip(best, truth, strict=True)]
    chosen = [with_answer_choice(row, choice) for row, choice in zip(rows, best, strict=True)]
    assert count_right_answers(model, chosen, batch_size=4).right_answers.tolist() == [1.0] * 8


@torch.no_grad()
def log_probability(model: MetaTokenForCausalLM, row: EncodedInstance, choice: tuple[int, ...]) -> float:
    start = row.answer_spans[0][0]
    ids = torch.tensor([[*row.input_ids[:start].tolist(), *choice]])
    log_probabilities = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[start - 1 + i, token]) for i, token in enumerate(choice))


def with_answer_choice(row: EncodedInstance, choice: tuple[int, ...]) -> EncodedInstance:
    start = row.answer_spans[0][0]
    ids = np.concatenate([row.input_ids[:start], np.array(choice)])
    return row._replace(input_ids=ids, targets=np.full_like(ids, -100), answer_spans=((start, len(ids)),))


def test_the_meta_token_is_never_an_answer(encoder: PieceEncoder, model: MetaTokenForCausalLM):
    rows = instances(encoder, CopyingTask())
    before = count_right_answers(model, rows, batch_size=8).right_tokens
    favourite = MetaTokenForCausalLM(model.config).eval()
    favourite.load_state_dict(model.state_dict())
    with torch.no_grad():
        # outputs along the final norm's bias become the meta-token's logit
        favourite.lm_head.weight[model.config.meta_token_id] = 1e4 * favourite.model.norm.bias.sign().clamp(min=1)
        favourite.model.norm.bias.add_(1)
    best = favourite(input_ids=torch.from_numpy(rows[0].input_ids[None])).logits.argmax(-1)
    assert (best == model.config.meta_token_id).any()
    rows_written = []
    for row in rows:
        ((start, stop),) = row.answer_spans
        rows_written.append(with_answer(row, [model.config.meta_token_id] * (stop - start)))
    assert count_right_answers(favourite, rows_written, batch_size=8).right_tokens.sum() == 0
    assert before.shape == (24,)


def config(**changes: object) -> EvaluateConfig:
    fields = {"size": (1, 2), "lengths": ("100-200", "2000-2100"), "instances": 10, "batch_size": 4}
    return EvaluateConfig(**{**fields, **changes})


def test_a_length_beyond_the_model_reads_not_available(encoder: PieceEncoder, model: MetaTokenForCausalLM):
    rows = evaluate_recall([model, model], config(), encoder)
    assert rows[0].models == 2
    assert len(rows[0].sequence_outcomes) == 2
    assert rows[0].sequence_accuracy is not None
    assert rows[1].sequence_accuracy is rows[1].token_accuracy is None
    assert rows[1].sequence_outcomes == ()
    written = json.loads(json.dumps(dataclasses.asdict(report(rows, config(), ["a", "b"], model))))
    assert written["format"] == "recall/1"
    assert written["rows"][1]["token_accuracy"] is None


def test_one_model_with_one_answer_has_wilsons_interval_and_several_questions_a_bootstrap(
    encoder: PieceEncoder, model: MetaTokenForCausalLM
):
    (single, _), (several, _) = (
        evaluate_recall([model], config(task=CopyingTask(questions=n)), encoder) for n in (1, 2)
    )
    assert single.sequence_accuracy is not None
    assert single.sequence_accuracy.estimate == 0
    assert single.sequence_accuracy.high == pytest.approx(0.2775, abs=1e-3)  # Wilson's for none of ten
    assert several.sequence_accuracy is not None
    assert several.sequence_accuracy == single.sequence_accuracy, "no bootstrap draw differs where nothing is right"


def test_an_intervention_changes_the_answers_and_is_named_in_the_row(
    encoder: PieceEncoder, model: MetaTokenForCausalLM
):
    rows = evaluate_recall([model], config(lengths=("100-200",)), encoder, interventions=(NoMetaAttention(),))
    assert rows[0].interventions == ("no_meta_attention",)


@pytest.mark.parametrize("task", [CopyingTask(), ListPointerTask()], ids=["written", "chosen"])
def test_a_model_whose_logits_are_no_numbers_has_no_accuracy(
    task: Task, encoder: PieceEncoder, model: MetaTokenForCausalLM
):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(NumericError, match="logits of the answers: expected finite ones"):
        count_right_answers(broken, instances(encoder, task, 4), batch_size=4)
