"""Position coupling (Cho et al. 2024): which tokens share a position, in training, scoring and beyond the window."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from dense_model import dense_logits
from metatokens.config.analysis import TaskSubject
from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig, FreshStart, Stage
from metatokens.config.schema import ModelConfig
from metatokens.config.tasks import CopyingTask, Difficulty, ListPointerTask, ListRecallTask, Task
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.errors import UsageError
from metatokens.evaluation.recall import count_right_answers, evaluate_recall, make_test_instances
from metatokens.model import MetaTokenForCausalLM
from metatokens.tasks.base import META, Instance, PieceEncoder
from metatokens.tasks.coupling import check_coupling, couple_tokens
from metatokens.tasks.curriculum import RecallBatches
from metatokens.tasks.encoding import EncodedInstance, encode_instance, pad
from metatokens.training.initialization import build_model
from task_drawing import byte_encoder, instance_of, word_encoder
from tiny_models import assert_close, gradients, randomize

POSITIONS = 24
UNIFORM = {"kind": "uniform", "meta_ratio": 0.2}
TASKS: dict[str, Task] = {
    "list_recall": ListRecallTask(coupling="items", questions=2),
    "list_recall with bars": ListRecallTask(coupling="items", marks=True, meta_places={"kind": "every"}),
    "list_pointer": ListPointerTask(coupling="items", numbered=False, meta_places=UNIFORM),
    "copying": CopyingTask(coupling="span", meta_places={"kind": "decoy"}),
    "copying, two spans": CopyingTask(coupling="span", questions=2, marks="double"),
    "copying, no marks": CopyingTask(coupling="span", questions=2, marks=False),
}


def groups_of_characters(instance: Instance, task: Task) -> list[int]:
    """Say in plain words of each character of the text which group it is in."""
    text, groups = instance.text, [0] * len(instance.text)

    def fill(start: int, stop: int, group: int) -> None:
        groups[start:stop] = [group] * (stop - start)

    if task.kind != "copying":
        for found in re.finditer(r"List \w+:([^.]*)\.", text):
            start = found.start(1)
            for number, entry in enumerate(found[1].split(","), start=1):
                fill(start, start + len(entry) + 1, number)  # with its comma
                start += len(entry) + 1
            fill(found.end(1), found.end(), 0)  # the full stop of the last
        questions = re.finditer(r"[. |]* (?:Item|Point to item) (\d+) of \w+(?: is|:) \w+", text)
        for found in questions:
            body = len("".join(piece for piece in instance.pieces[: instance.body_stop] if piece != META))
            fill(max(found.start(), body), found.end(), int(found[1]))
        return groups
    spans = [" " + answer for answer in instance.answers]
    first, cursor = 1, text.index("Copy 1")
    for number, span in enumerate(spans, start=1):
        cursor = text.index(f" Copy {number}:", cursor - 1)
        before = text.rindex(".", 0, cursor + 1) if number > 1 else cursor
        fill(before, cursor + len(f" Copy {number}:"), first)
        cursor += len(f" Copy {number}:")
        for word, match in enumerate(re.finditer(r" \w+", span), start=1):
            fill(cursor + match.start(), cursor + match.end(), first + word)
        cursor += len(span)
        first += 1 + len(span.split())
    return groups


@pytest.mark.parametrize("name", [name for name in TASKS if name != "copying, no marks"])
def test_groups_are_those_that_the_text_shows(name: str) -> None:
    task = TASKS[name]
    for index in range(6):
        instance = instance_of(task, index=index)
        groups = couple_tokens(instance, task, word_encoder())
        expected = groups_of_characters(instance, task)
        if task.kind == "copying":  # of the body, by its brackets
            first = 1
            for found in re.finditer(r"((?: \[)+)((?: \w+)+)(?: \])+", instance.text):
                expected[found.start(1) : found.end(1)] = [first] * (found.end(1) - found.start(1))
                for word, match in enumerate(re.finditer(r" \w+", found[2]), start=1):
                    start, stop = found.start(2) + match.start(), found.start(2) + match.end()
                    expected[start:stop] = [first + word] * (stop - start)
                first += 1 + len(found[2].split())
        pieces = [piece for piece in instance.pieces if piece != META]
        ends = np.cumsum([len(piece) for piece in pieces])
        assert groups.tolist() == [expected[end - 1] for end in ends]
        assert groups.max() > 1


def test_spans_without_marks_have_the_groups_of_those_with_marks() -> None:
    for index in range(6):
        with_marks, without = (CopyingTask(coupling="span", questions=2, marks=marks) for marks in (True, False))
        marked, plain = instance_of(with_marks, index=index), instance_of(without, index=index)
        pieces = [piece for piece in marked.pieces if piece != META]
        kept = [
            group
            for piece, group in zip(pieces, couple_tokens(marked, with_marks, word_encoder()), strict=True)
            if piece not in (" [", " ]")
        ]
        if [piece for piece in plain.pieces if piece != META] == [p for p in pieces if p not in (" [", " ]")]:
            assert couple_tokens(plain, without, word_encoder()).tolist() == kept
            return
    raise AssertionError("no two instances have the same text")


def test_words_of_many_tokens_are_coupled_token_by_token_in_spans_and_as_one_in_lists() -> None:
    encoder = byte_encoder()
    for task in (CopyingTask(coupling="span"), ListRecallTask(coupling="items")):
        instance = instance_of(task, (2, 2), (1, 400), encoder=encoder)
        groups = couple_tokens(instance, task, encoder)
        answer = groups[-encoder.count(instance.pieces[slice(*instance.answer_pieces[-1])]) :]
        if task.kind == "copying":
            assert answer.tolist() == list(range(2, 2 + len(answer)))
        else:
            assert len(answer) > 1
            assert len(set(answer.tolist())) == 1


@pytest.mark.parametrize("name", TASKS)
def test_coupling_changes_no_text_and_a_meta_token_is_in_the_group_of_the_token_before_it(name: str) -> None:
    task, encoder = TASKS[name], word_encoder()
    plain = task.model_copy(update={"coupling": None})
    coupled, counted = (encoded(one) for one in (task, plain))
    assert counted.groups is None
    assert (coupled.input_ids == counted.input_ids).all()
    places = np.flatnonzero(coupled.input_ids == encoder.vocab_size)
    assert len(places)
    of_text = coupled.groups[coupled.input_ids != encoder.vocab_size]
    assert (of_text == couple_tokens(instance_of(task), task, encoder)).all()
    assert (coupled.groups[places[places > 0]] == coupled.groups[places[places > 0] - 1]).all()
    assert coupled.num_positions == coupled.groups.max() + 1 < counted.num_positions == len(counted.input_ids)


def encoded(task: Task, index: int = 0, encoder: PieceEncoder | None = None, **shape: Any) -> EncodedInstance:
    encoder = encoder or word_encoder()
    instance = instance_of(task, index=index, encoder=encoder, **shape)
    return encode_instance(instance, task, encoder=encoder, meta_token_id=encoder.vocab_size)


def model_of(encoder: PieceEncoder, **changes: Any) -> MetaTokenForCausalLM:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": POSITIONS, "position_encoding": "learned"}
    built = build_model(ModelConfig(**{**shape, **changes}), text_vocab_size=encoder.vocab_size, eos_token_id=0, seed=0)
    return randomize(built).double().eval()


def coupled_batches(encoder: PieceEncoder, task: Task, **changes: Any) -> RecallBatches:
    config = FinetuneConfig(
        task=task,
        curriculum=(Stage(steps=40, size=(2, 5), prompt_tokens=(1, 90)),),
        training={"batch_blocks": 4, "micro_batch_blocks": 4},
        train_instances=6,
    )
    special = {"meta_token_id": encoder.vocab_size, "pad_token_id": encoder.vocab_size + 1}
    return RecallBatches(config, encoder, num_positions=POSITIONS, **special, **changes)


def test_rows_of_training_start_at_drawn_positions_that_are_a_function_of_the_step() -> None:
    encoder, task = word_encoder(), TASKS["copying"]
    batches, again = (coupled_batches(encoder, task) for _ in range(2))
    plain = coupled_batches(encoder, task.model_copy(update={"coupling": None}))
    parts = [coupled_batches(encoder, task, rank=rank, world_size=2) for rank in range(2)]
    starts: list[int] = []
    highest = 0
    for step in reversed(range(40)):
        batch = batches.batch_at(step)
        assert plain.batch_at(step).position_ids is None
        assert (batch.input_ids == plain.batch_at(step).input_ids).all()
        for rank, part in enumerate(parts):
            own = part.batch_at(step).position_ids
            assert (own == batch.position_ids[rank::2, : own.shape[1]]).all()
        for row, ids in zip(batch.position_ids, batch.input_ids, strict=True):
            assert (row[ids == encoder.vocab_size + 1] == 0).all()
            starts.append(int(row[row > 0].min()) - 1)
            highest = max(highest, int(row.max()))
    assert highest == POSITIONS - 1
    assert (min(starts), len(set(starts)) > 10) == (0, True)
    for step in range(40):
        assert (again.batch_at(step).position_ids == batches.batch_at(step).position_ids).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["list_recall", "copying"])
def test_logits_and_gradients_of_a_batch_are_those_of_the_definition(name: str, training: bool) -> None:
    encoder = word_encoder()
    rows = [encoded(TASKS[name], index) for index in range(4)]
    tested = pad(rows, meta_token_id=encoder.vocab_size, pad_token_id=encoder.vocab_size + 1)
    batch = coupled_batches(encoder, TASKS[name]).batch_at(3) if training else tested
    inputs, found = batch.to_model_inputs(), []
    for is_dense in (False, True):
        model = model_of(encoder)
        ids = inputs["input_ids"]
        if is_dense:
            added = model.model.embed_positions.weight[inputs["position_ids"]]
            special = {key: getattr(model.config, key) for key in ("meta_token_id", "pad_token_id")}
            logits = dense_logits(model, ids, added=added, **special)
        else:
            logits = model(**{key: value for key, value in inputs.items() if key != "shift_labels"}).logits
        real = logits[ids != model.config.pad_token_id]
        real.square().sum().backward()
        found.append((real.detach(), gradients(model)))
    (logits, of_model), (expected, of_definition) = found
    assert_close(logits, expected, 1e-8)
    assert of_model.keys() == of_definition.keys()
    for key, gradient in of_definition.items():
        assert_close(of_model[key], gradient, 1e-8)


@torch.no_grad()
def decode(model: MetaTokenForCausalLM, row: EncodedInstance, start: int, stop: int) -> list[int]:
    """Write an answer greedily, token by token over a cache."""
    cache = DynamicCache(config=model.config)
    ids, places, written = row.input_ids[:start], row.groups[:start], []
    for place in row.groups[start:stop]:
        mask = torch.ones(1, start + len(written), dtype=torch.long)
        inputs = {"input_ids": ids, "position_ids": places}
        given: dict[str, Tensor] = {name: torch.from_numpy(array)[None] for name, array in inputs.items()}
        logits = model(**given, attention_mask=mask, past_key_values=cache).logits[0, -1]
        written.append(int(logits[: model.config.meta_token_id].argmax()))
        ids, places = np.array(written[-1:]), np.array([place])
    return written


def test_what_counts_as_right_is_what_decoding_at_the_coupled_positions_writes() -> None:
    encoder = word_encoder()
    model = model_of(encoder, max_position_embeddings=120)
    rows = [encoded(TASKS["copying"], index) for index in range(12)]
    truth = [row.input_ids[slice(*row.answer_spans[0])].tolist() for row in rows]
    answers = [decode(model, row, *row.answer_spans[0]) for row in rows]
    written = [
        row._replace(input_ids=np.array([*row.input_ids[: -len(a)], *a])) for row, a in zip(rows, answers, strict=True)
    ]
    assert count_right_answers(model, written, batch_size=5).right_answers.tolist() == [1.0] * 12
    assert count_right_answers(model, rows, batch_size=5).right_answers.tolist() == [
        float(a == t) for a, t in zip(answers, truth, strict=True)
    ]
    counted = [row._replace(groups=None) for row in written]
    assert count_right_answers(model, counted, batch_size=5).right_answers.sum() < 12


@torch.no_grad()
def test_choices_of_many_tokens_are_scored_at_the_position_of_the_item() -> None:
    encoder = PieceEncoder(TextEncoder(train_tokenizer(["the cat sat on the mat"] * 3, 270)))
    task = ListPointerTask(coupling="items")
    model = model_of(encoder, max_position_embeddings=400)
    model.model.embed_positions.weight.mul_(4)  # so that places matter
    rows = [encoded(task, index, encoder, size=(2, 2), prompt_tokens=(1, 300)) for index in range(12)]
    best = []
    for row in rows:
        start, scores = row.answer_spans[0][0], []
        for choice in row.choices:
            ids = torch.tensor([[*row.input_ids[:start].tolist(), *choice]])
            places = torch.tensor([[*row.groups[:start].tolist(), *[int(row.groups[start])] * len(choice)]])
            logits = model(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[start - 1 + i, token]) for i, token in enumerate(choice)))
        best.append(row.choices[int(np.argmax(scores))])
    assert max(map(len, best)) > 1
    truth = [tuple(row.input_ids[slice(*row.answer_spans[0])].tolist()) for row in rows]
    expected = [float(a == b) for a, b in zip(best, truth, strict=True)]
    assert count_right_answers(model, rows, batch_size=4).right_answers.tolist() == expected
    chosen = []
    for row, choice in zip(rows, best, strict=True):
        start = row.answer_spans[0][0]
        ids = np.array([*row.input_ids[:start], *choice])
        groups = np.array([*row.groups[:start], *[row.groups[start]] * len(choice)])
        targets = np.full_like(ids, -100)
        spans = ((start, len(ids)),)
        chosen.append(row._replace(input_ids=ids, targets=targets, groups=groups, answer_spans=spans))
    assert count_right_answers(model, chosen, batch_size=4).right_answers.tolist() == [1.0] * 12


def test_a_text_of_more_tokens_than_the_table_has_positions_is_scored_and_one_of_more_groups_is_not() -> None:
    encoder = word_encoder()
    model = model_of(encoder)
    for size, is_scored in (((3, 4), True), ((30, 30), False)):
        config = EvaluateConfig(task=TASKS["copying"], size=size, lengths=("100-140",), instances=3)
        (row,) = evaluate_recall([model], config, encoder)
        assert (row.token_accuracy is not None) is is_scored
    counted = EvaluateConfig(task=CopyingTask(), size=(3, 4), lengths=("100-140",), instances=3, extrapolate=True)
    (row,) = evaluate_recall([model], counted, encoder)
    assert row.token_accuracy is None


def test_evaluation_starts_at_the_first_position() -> None:
    encoder, task = word_encoder(), TASKS["copying"]
    special = {"meta_token_id": encoder.vocab_size, "seed": 0}
    difficulty = Difficulty(size=(3, 4), prompt_tokens=(1, 90))
    rows = make_test_instances(task, difficulty, encoder=encoder, instances=3, **special)
    batch = pad(rows, meta_token_id=encoder.vocab_size, pad_token_id=encoder.vocab_size + 1)
    for row, positions in zip(rows, batch.position_ids, strict=True):
        assert (positions[: len(row.groups)] == row.groups).all()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"position_encoding": "rope"}, "positions rope"),
        ({"position_range": 600}, "positions learned, position_range"),
        ({"attention": {"kind": "memory", "window": 8}}, "positions learned, memory"),
    ],
)
def test_a_model_that_cannot_place_tokens_so_is_refused_in_one_line(changes: dict[str, Any], found: str) -> None:
    model = model_of(word_encoder(), **changes)
    with pytest.raises(UsageError, match=f"task.coupling: expected .*learned positions.*found {found}") as caught:
        check_coupling(TASKS["copying"], model.config)
    assert "\n" not in str(caught.value)
    check_coupling(CopyingTask(), model.config)
    config = EvaluateConfig(task=TASKS["copying"], lengths=("1-40",), instances=1)
    with pytest.raises(UsageError, match=r"task\.coupling"):
        evaluate_recall([model], config, word_encoder())


def test_a_model_of_another_package_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    with pytest.raises(UsageError, match="found positions those of a gpt2"):
        check_coupling(TASKS["copying"], gpt2.config)


@pytest.mark.parametrize("task", [{"kind": "parity"}, {"kind": "segment_counting"}, {"kind": "copying"}])
def test_a_task_without_such_a_structure_is_refused(task: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="coupling"):
        FinetuneConfig(start=FreshStart(), task={**task, "coupling": "items"})


def test_an_analysis_of_a_task_with_coupling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"subject\.task\.coupling must be off"):
        TaskSubject(task=TASKS["copying"], difficulty=Difficulty(size=(2, 2), prompt_tokens=(1, 90)))
