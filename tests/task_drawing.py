"""What the tests of the recall tasks share: an encoder whose every word is one token, and instances drawn as text."""

from functools import cache
from itertools import pairwise

from tokenizers import Tokenizer

from metatokens.config.tasks import (
    CopyingTask,
    Difficulty,
    ListPointerTask,
    ListRecallTask,
    ParityTask,
    SegmentCountingTask,
    Task,
)
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.tasks.base import META, Instance, PieceEncoder
from metatokens.tasks.encoding import encode_instance
from metatokens.tasks.registry import make_instance
from metatokens.tasks.words import ITEMS, NAMES

SENTENCES = (
    "List castle: 1 river, 2 stone. List castle: 1 river. Item 10 of castle is stone. Count of acid is 0.",
    "List castle: 1 river. Point to item 2 of castle: stone.",
    "Text: river [ stone ] stone. Copy 1: acid.",
    "Bits: 0 1 | 0 1. Parity 1 is 1.",
)
MAX_COLUMNS = 108


@cache
def word_tokenizer() -> Tokenizer:
    """Return a byte-level BPE trained until every word of the tasks is one token."""
    words = " ".join((*ITEMS, *NAMES, *map(str, range(30))))
    return train_tokenizer([words, words, *SENTENCES * 9], 4_000)


@cache
def word_encoder() -> PieceEncoder:
    return PieceEncoder(TextEncoder(word_tokenizer()))


@cache
def byte_encoder() -> PieceEncoder:
    """Return an encoder with few merges, so that words are several tokens."""
    return PieceEncoder(TextEncoder(train_tokenizer(["the river and the stone in the castle is of a lion"] * 2, 280)))


def instance_of(task: Task, size=(3, 6), prompt_tokens=(1, 96), *, encoder=None, seed=0, split="train", index=0):
    difficulty = Difficulty(size=size, prompt_tokens=prompt_tokens)
    encoder = word_encoder() if encoder is None else encoder
    return make_instance(task, difficulty, encoder=encoder, seed=seed, split=split, index=index)


def draw(instance: Instance, task: Task) -> str:
    """Draw an instance whose pieces are one token each: its input and its targets for both kinds of loss."""
    encoder = word_encoder()
    names = {encoder.ids(piece)[0]: piece.strip() for piece in instance.pieces if piece != META}
    assert all(len(encoder.ids(piece)) == 1 for piece in instance.pieces if piece != META)
    rows = {}
    for loss in ("answer", "full"):
        changed = task.model_copy(update={"loss": loss})
        encoded = encode_instance(instance, changed, encoder=encoder, meta_token_id=encoder.vocab_size)
        rows["input"] = [names.get(token, "_") for token in encoded.input_ids.tolist()]
        rows[loss] = [names[token] if token >= 0 else "-" for token in encoded.targets.tolist()]
    widths = [max(map(len, cells)) for cells in zip(*rows.values(), strict=True)]
    starts = [0]
    length = 0
    for column, width in enumerate(widths):
        length += width + 1
        if length > MAX_COLUMNS - 11:
            starts.append(column)
            length = width + 1
    blocks = []
    for start, stop in pairwise((*starts, len(widths))):
        cells = {name: zip(row[start:stop], widths[start:stop], strict=True) for name, row in rows.items()}
        blocks.append(
            "\n".join(
                f"    {name:<6} {' '.join(cell.ljust(width) for cell, width in row)}".rstrip()
                for name, row in cells.items()
            )
        )
    return "\n\n".join(blocks)


DRAWN = {
    "list_recall": (ListRecallTask(num_lists=(2, 2), questions=2), (2, 2), (1, 40), 4),
    "segment_counting": (
        SegmentCountingTask(numbered=False, num_lists=(2, 2), num_items=2, questions=2),
        (4, 4),
        (1, 40),
        25,
    ),
    "parity": (ParityTask(questions=2), (5, 5), (1, 21), 3),
    "copying": (CopyingTask(), (3, 3), (12, 20), 9),
    "list_pointer": (ListPointerTask(num_lists=(2, 2), numbered=False), (2, 2), (1, 40), 0),
}
"""What the docstring of each task draws: the task, its size, the length of the prompt and the index."""


def drawn_instance(name: str) -> tuple[Task, Instance]:
    task, size, prompt_tokens, index = DRAWN[name]
    return task, instance_of(task, size, prompt_tokens, index=index)
