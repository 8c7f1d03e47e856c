"""What the places of meta-tokens tell about the answer: everything in the paper's recall tasks, elsewhere nothing.

The solver here reads no name: of a prompt it sees where lists end, where meta-tokens (or bars) stand, and the number
of the item that is asked for.
"""

import re
from collections import Counter

import pytest

from metatokens.config.tasks import CopyingTask, ListPointerTask, ListRecallTask, ParityTask, SegmentCountingTask
from metatokens.data.special_tokens import META_TOKEN
from metatokens.tasks.encoding import encode_instance
from task_drawing import instance_of, word_encoder, word_tokenizer

NUM_LISTS, SIZE = 4, 3
INSTANCES = 600
RECALL = (ListRecallTask, ListPointerTask)


def four_deviations(share, draws=INSTANCES):
    return 4 * (share * (1 - share) / draws) ** 0.5


def read_row(task, index):
    """Return the pieces that a model reads, META_TOKEN among them, and the answer."""
    encoder = word_encoder()
    instance = instance_of(task, (SIZE, SIZE), (1, 90), index=index)
    row = encode_instance(instance, task, encoder=encoder, meta_token_id=encoder.vocab_size).input_ids.tolist()
    return [META_TOKEN if id == encoder.vocab_size else word_tokenizer().decode([id]) for id in row], instance.answers[
        0
    ]


def guess_by_place(pieces, place):
    """Return the asked item of the first list right behind which `place` stands, or else of the first list.

    Before the question it stands whichever list is asked for, so there it counts from the second on.
    """
    text, num_before = [], Counter()
    for piece in pieces:
        if piece == place:
            num_before[len(text)] += 1
        elif piece not in (META_TOKEN, " |"):
            text.append(piece)
    stops = [index for index, piece in enumerate(text) if piece == "."][:NUM_LISTS]
    num_before[stops[-1] + 1] -= 1
    marked = [index for index, stop in enumerate(stops) if num_before[stop + 1] > 0]
    lists = "".join(text).split("List ")[1:]
    number = re.search(r"[Ii]tem (\d+)", "".join(text)).group(1)
    return re.search(rf" {number} (\w+)", lists[marked[0] if marked else 0]).group(1)


def accuracy(task, place):
    rows = [read_row(task, index) for index in range(INSTANCES)]
    return sum(guess_by_place(pieces, place) == answer for pieces, answer in rows) / INSTANCES


def recall_task(config, kind, *, marks=False):
    return config(meta_places={"kind": kind}, num_lists=(NUM_LISTS, NUM_LISTS), marks=marks)


@pytest.mark.parametrize("config", RECALL)
def test_paper_places_give_the_list_away_without_its_name(config):
    assert accuracy(recall_task(config, "task"), META_TOKEN) == 1


@pytest.mark.parametrize("kind", ["every", "decoy", "uniform", "none"])
@pytest.mark.parametrize("config", RECALL)
def test_other_places_of_recall_leave_a_solver_without_names_at_chance(config, kind):
    chance = 1 / NUM_LISTS
    assert abs(accuracy(recall_task(config, kind), META_TOKEN) - chance) < four_deviations(chance)


@pytest.mark.parametrize("kind", ["task", "none"])
def test_marks_tell_a_model_without_meta_tokens_what_the_paper_places_tell(kind):
    assert accuracy(recall_task(ListRecallTask, kind, marks=True), " |") == 1


@pytest.mark.parametrize("kind", ["every", "decoy"])
def test_marks_at_other_places_tell_as_little_as_the_meta_tokens_there(kind):
    chance = 1 / NUM_LISTS
    assert abs(accuracy(recall_task(ListRecallTask, kind, marks=True), " |") - chance) < four_deviations(chance)


def test_decoys_of_counting_are_in_the_asked_list_by_chance_alone():
    chance = 1 / NUM_LISTS
    task = SegmentCountingTask(meta_places={"kind": "decoy"}, num_lists=(NUM_LISTS, NUM_LISTS))
    hits = 0
    for index in range(INSTANCES):
        lists = "".join(instance_of(task, (SIZE, SIZE), (1, 90), index=index).pieces).split("List")
        (marked,) = (part for part in lists if "[" in part)
        hits += META_TOKEN in marked
    assert abs(hits / INSTANCES - chance) < four_deviations(chance)


def test_decoy_of_parity_is_behind_the_asked_bits_by_chance_alone():
    task, num_bits = ParityTask(meta_places={"kind": "decoy"}), 8
    hits = 0
    for index in range(INSTANCES):
        # Bits : and a full stop, the bar, Parity 1 is
        text = "".join(instance_of(task, (4, 4), (num_bits + 7, num_bits + 7), index=index).pieces)
        assert len(re.findall("[01]", text.partition(".")[0])) == num_bits
        hits += f"{META_TOKEN} |" in text
    assert abs(hits / INSTANCES - 1 / (num_bits - 1)) < four_deviations(1 / (num_bits - 1))


def test_decoys_of_copying_are_around_the_asked_words_by_chance_alone():
    task, num_words = CopyingTask(meta_places={"kind": "decoy"}), 10
    hits = 0
    for index in range(INSTANCES):
        # Text : and a full stop, two brackets, Copy 1 :
        text = "".join(instance_of(task, (SIZE, SIZE), (num_words + 8, num_words + 8), index=index).pieces)
        hits += f"{META_TOKEN} [" in text and f"{META_TOKEN} ]" in text
    chance = 1 / (num_words - SIZE)  # a span never ends the text
    assert abs(hits / INSTANCES - chance) < four_deviations(chance)
