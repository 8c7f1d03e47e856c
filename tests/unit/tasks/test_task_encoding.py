"""Instances as tokens: piece by piece as whole, meta-tokens at their places, targets under what predicts them."""

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from metatokens.config.tasks import (
    CopyingTask,
    ListPointerTask,
    ListRecallTask,
    NoPlaces,
    ParityTask,
    PeriodicPlaces,
    UniformPlaces,
)
from metatokens.data.special_tokens import END_OF_TEXT
from metatokens.data.tokenizer import TextEncoder, build_hf_tokenizer, train_tokenizer
from metatokens.errors import UsageError
from metatokens.tasks.base import META, Instance, PieceEncoder
from metatokens.tasks.encoding import encode_instance, pad
from metatokens.tasks.registry import find_task, task_names
from pairwise import all_pairs
from task_drawing import byte_encoder, instance_of, word_encoder, word_tokenizer

ENCODERS = {"words": word_encoder, "bytes": byte_encoder}
PLACES = ("task", "decoy", "uniform", "none")


def encode(instance, task, encoder=None, **options):
    encoder = word_encoder() if encoder is None else encoder
    return encode_instance(instance, task, encoder=encoder, meta_token_id=encoder.vocab_size, **options)


def merged(*merges: tuple[str, str], use_regex: bool = False) -> Tokenizer:
    """Return a byte-level BPE with these merges; without the pattern it never splits a text."""
    tokens = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", task_names())
def test_ids_of_the_pieces_are_the_ids_of_the_whole_text(name, kind):
    encoder = ENCODERS[kind]()
    task = find_task(name).config(questions=2, meta_places=NoPlaces())
    for index in range(40):
        instance = instance_of(task, (2, 5), (1, 400), encoder=encoder, index=index)
        whole = encoder.text_encoder.encode_batch([instance.text])[0]
        assert encode(instance, task, encoder).input_ids.tolist() == whole.tolist()


@pytest.mark.parametrize("name", task_names())
def test_gpt2s_split_pattern_cuts_between_all_pieces(name):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for index in range(100):
        instance = instance_of(find_task(name).config(questions=3), index=index)
        starts, length = set(), 0
        for piece in instance.pieces:
            starts.add(length)
            length += len(piece) if piece != META else 0
        assert starts - {length} <= {start for _, (start, _) in split.pre_tokenize_str(instance.text)}


@pytest.mark.parametrize("name", task_names())
def test_model_tokenizer_reads_the_text_with_its_metas_as_the_same_ids(name):
    tokenizer = build_hf_tokenizer(word_tokenizer())
    task = find_task(name).config(questions=2)
    for index in range(20):
        instance = instance_of(task, index=index)
        ids = tokenizer("".join(instance.pieces), add_special_tokens=False)["input_ids"]
        assert encode(instance, task).input_ids.tolist() == ids


def targets_by_hand(encoded, meta_token_id, loss, loss_policy):
    """Walk over the row and give each text token to the position that must predict it."""
    row = encoded.input_ids.tolist()
    answers = {position for start, stop in encoded.answer_spans for position in range(start, stop)}
    expected, last_text = [-100] * len(row), None
    for position, token in enumerate(row):
        if token == meta_token_id:
            continue
        if last_text is not None and (loss == "full" or position in answers):
            expected[position - 1 if loss_policy == "skip" else last_text] = token
        last_text = position
    return expected


@all_pairs(name=task_names(), places=PLACES, loss=("answer", "full"), loss_policy=("skip", "retarget"))
def test_targets_are_the_text_tokens_that_the_loss_names(name, places, loss, loss_policy):
    task = find_task(name).config(questions=2, loss=loss, meta_places={"kind": places})
    for kind, make_encoder in ENCODERS.items():
        encoder = make_encoder()
        for index in range(10):
            instance = instance_of(
                task, (2, 5), (1, 128) if kind == "words" else (1, 400), encoder=encoder, index=index
            )
            encoded = encode(instance, task, encoder, loss_policy=loss_policy)
            assert encoded.targets.tolist() == targets_by_hand(encoded, encoder.vocab_size, loss, loss_policy)
            num_targets = int((encoded.targets >= 0).sum())
            num_text = int((encoded.input_ids != encoder.vocab_size).sum())
            assert num_targets == (num_text - 1 if loss == "full" else sum(b - a for a, b in encoded.answer_spans))


@all_pairs(name=task_names(), places=PLACES)
def test_spans_hold_the_answers_and_the_rest_is_the_prompt(name, places):
    task = find_task(name).config(questions=3, meta_places={"kind": places})
    encoder = byte_encoder()
    for index in range(20):
        instance = instance_of(task, (3, 5), (1, 400), encoder=encoder, index=index)
        encoded = encode(instance, task, encoder)
        row = encoded.input_ids.tolist()
        for (start, stop), answer in zip(encoded.answer_spans, instance.answers, strict=True):
            assert row[start:stop] == encoder.text_encoder.encode_batch([f" {answer}"])[0].tolist()
        assert encoded.answer_spans[-1][1] == len(row)
        before = row[: encoded.answer_spans[-1][0]]
        assert encoded.prompt_length == sum(token != encoder.vocab_size for token in before)


def test_drawing_of_the_docstring_holds():
    encoder = word_encoder()
    instance = Instance((" river", META, " stone", META, " lamb", " lion"), ((4, 6),), 2)
    a, b, c, d = (encoder.ids(piece)[0] for piece in (" river", " stone", " lamb", " lion"))
    meta, none = encoder.vocab_size, -100
    rows = {
        ("answer", "skip"): [none, none, none, c, d, none],
        ("full", "skip"): [none, b, none, c, d, none],
        ("full", "retarget"): [b, none, c, none, d, none],
    }
    for (loss, loss_policy), targets in rows.items():
        encoded = encode(instance, CopyingTask(loss=loss), loss_policy=loss_policy)
        assert encoded.input_ids.tolist() == [a, meta, b, meta, c, d]
        assert encoded.targets.tolist() == targets
        assert encoded.answer_spans == ((4, 6),)


def test_uniform_places_have_the_ratio_and_every_slot_of_the_prompt():
    task = ParityTask(meta_places=UniformPlaces(meta_ratio=0.2), questions=2)
    encoder, slots = word_encoder(), set()
    for index in range(300):
        encoded = encode(instance_of(task, (4, 4), (20, 20), index=index), task)
        metas = [i for i, token in enumerate(encoded.input_ids.tolist()) if token == encoder.vocab_size]
        num_prompt = 20 - 1  # of the 20 tokens before the last answer, one is the first answer
        assert len(metas) == round(0.2 * (num_prompt + len(metas)))
        slots |= {position - number for number, position in enumerate(metas)}
    answers = (len(encoded.input_ids) - len(metas) - 1 - 5, len(encoded.input_ids) - len(metas) - 1)
    # before every text token but the one behind the first answer
    assert slots == set(range(21)) - {answers[0] + 1}


@pytest.mark.parametrize("every", [1, 4, 9])
def test_periodic_places_follow_every_nth_text_token_of_the_prompt(every):
    task = CopyingTask(meta_places=PeriodicPlaces(every=every), questions=2)
    encoder = word_encoder()
    for index in range(20):
        encoded = encode(instance_of(task, (3, 3), (40, 60), index=index), task)
        is_answer = np.zeros(len(encoded.input_ids), dtype=bool)
        for start, stop in encoded.answer_spans:
            is_answer[start:stop] = True
        is_meta = encoded.input_ids == encoder.vocab_size
        assert not (is_meta & is_answer).any()
        number = np.cumsum(~is_meta & ~is_answer)
        # as many meta-tokens as periods, each after the text token that ends one; a period that ends the text has none
        assert number[is_meta].tolist() == [every * k for k in range(1, is_meta.sum() + 1)]
        assert is_meta.sum() == number[-1] // every


def test_a_range_of_periods_is_drawn_anew_for_each_instance():
    task, periods = CopyingTask(meta_places=PeriodicPlaces(every=(3, 6))), []
    for index in range(60):
        ids = encode(instance_of(task, (3, 3), (40, 60), index=index), task).input_ids
        periods.append(int(np.flatnonzero(ids == word_encoder().vocab_size)[0]))
    assert {*periods} == {3, 4, 5, 6}
    again = encode(instance_of(task, (3, 3), (40, 60), index=7), task).input_ids
    assert int(np.flatnonzero(again == word_encoder().vocab_size)[0]) == periods[7]


def test_uniform_places_do_not_depend_on_the_answers():
    task = ParityTask(meta_places=UniformPlaces(meta_ratio=0.3))
    instance = instance_of(task)
    other = instance._replace(pieces=(*instance.pieces[:-1], " 1" if instance.answers == ("0",) else " 0"))
    assert encode(instance, task).input_ids[:-1].tolist() == encode(other, task).input_ids[:-1].tolist()


def test_uniform_places_differ_between_instances():
    task = CopyingTask(meta_places=UniformPlaces(meta_ratio=0.3))
    rows = [encode(instance_of(task, (3, 3), (40, 40), index=index), task).input_ids for index in range(5)]
    assert len({tuple((row == word_encoder().vocab_size).tolist()) for row in rows}) == 5


def test_no_places_leave_the_text_alone():
    task = ListRecallTask(meta_places=NoPlaces(), questions=2)
    assert word_encoder().vocab_size not in encode(instance_of(task), task).input_ids


def test_choices_are_encoded_as_they_stand_in_the_prompt():
    task, encoder = ListPointerTask(), byte_encoder()
    instance = instance_of(task, (2, 3), (1, 400), encoder=encoder)
    encoded = encode(instance, task, encoder)
    assert len(encoded.choices) == len(instance.choices) > 1
    start, stop = encoded.answer_spans[0]
    assert tuple(encoded.input_ids[start:stop].tolist()) in encoded.choices
    assert encode(instance_of(ListRecallTask()), ListRecallTask()).choices == ()


def test_rows_are_padded_on_the_right():
    task = ParityTask()
    short, long = (encode(instance_of(task, (4, 4), (n, n)), task) for n in (20, 30))
    batch = pad([short, long], pad_token_id=9_999, meta_token_id=word_encoder().vocab_size)
    inputs = batch.to_model_inputs()
    assert set(inputs) == {"input_ids", "shift_labels"}
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 32) for tensor in inputs.values())
    assert inputs["input_ids"][0].tolist() == [*short.input_ids.tolist(), *[9_999] * 10]
    assert inputs["shift_labels"][0].tolist() == [*short.targets.tolist(), *[-100] * 10]
    assert inputs["input_ids"][1].tolist() == long.input_ids.tolist()
    assert inputs["shift_labels"][1].tolist() == long.targets.tolist()
    assert (batch.num_rows, batch.num_text, batch.num_meta, batch.num_targets) == (2, 52, 2, 2)


def test_batch_of_nothing_or_with_the_meta_token_as_padding_is_a_value_error():
    with pytest.raises(ValueError, match="at least one"):
        pad([], pad_token_id=1, meta_token_id=2)
    with pytest.raises(ValueError, match="differ from meta_token_id 2"):
        pad([encode(instance_of(ParityTask()), ParityTask())], pad_token_id=2, meta_token_id=2)


def test_tokenizer_that_joins_words_is_a_usage_error():
    joins = merged(("e", "r"), ("er", ","))
    with pytest.raises(UsageError, match=r"tokenizer: ',' after 'butter': expected") as caught:
        PieceEncoder(TextEncoder(joins))
    assert "\n" not in str(caught.value)
    PieceEncoder(TextEncoder(merged(("e", "r"), ("er", ","), use_regex=True)))


def test_marks_that_a_tokenizer_joins_stay_apart():
    encoder = PieceEncoder(TextEncoder(merged(("]", "."), use_regex=True)))
    encoded = encoder.text_encoder.encode_batch(["a]."])[0]
    assert len(encoded) == 2  # "]." is one token of a text
    pieces = ("Text", ":", " cat", " [", " dog", " ]", ".", " Copy", " 1", ":", " dog")
    ids = encode(Instance(pieces, ((10, 11),), 7), CopyingTask(), encoder).input_ids
    assert set(ids.tolist()) > set(encoder.ids("."))
    assert encoded[-1] not in ids


def test_answer_that_the_tokenizer_joins_to_its_prompt_is_a_usage_error():
    # "is" and " 0" become one token; the probe of the words does not hold them side by side
    encoder = PieceEncoder(TextEncoder(merged(("i", "s"), ("Ġ", "0"), ("is", "Ġ0"))))
    task = ParityTask()
    instances = [instance_of(task, (2, 4), (1, 90), encoder=encoder, index=index) for index in range(20)]
    zero, one = (next(i for i in instances if i.answers == (bit,)) for bit in "01")
    assert encode(one, task, encoder).answer_spans
    with pytest.raises(UsageError, match=r"answer '0' after 'is'.*expected.*found.*use a tokenizer") as caught:
        encode(zero, task, encoder)
    assert "\n" not in str(caught.value)


def test_words_of_many_tokens_are_fine():
    encoder = PieceEncoder(TextEncoder(train_tokenizer(["a"], 257)))
    instance = instance_of(CopyingTask(), (1, 2), (60, 120), encoder=encoder)
    assert len(encode(instance, CopyingTask(), encoder).input_ids) == len(instance.text) + 2
