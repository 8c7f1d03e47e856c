"""Blocks with needles: what they hide, that it is gone when it is asked for, and which blocks they are."""

import re
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from metatokens.config.grafting import NeedlesConfig
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.long_context.tasks import TASKS
from metatokens.training.finetuning import word_tokenizer
from metatokens.training.needles import Needles

TOKENIZER = word_tokenizer()
ENCODER = TextEncoder(TOKENIZER)
ROWS, LENGTH, WINDOW = 200, 400, 40
UNUSED = ENCODER.vocab_size
"""Ids from here on are those of the text, so that its tokens are told from those of a case."""
FREE = ("needle", "multi-key", "multi-value", "variables", "passkey", "copying")


def text_of(rows: int = ROWS) -> np.ndarray:
    return UNUSED + np.arange(rows * (LENGTH + 1)).reshape(rows, LENGTH + 1)


def needles(*, share: float = 1.0, tasks: tuple[str, ...] = ("needle",), **changes: int) -> Needles:
    config = NeedlesConfig(share=share, tasks=tasks)
    return Needles(config, **{"encoder": ENCODER, "window": WINDOW, "block_size": LENGTH, "seed": 0, **changes})


def hide(maker: Needles, rows: int = ROWS, epochs: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return maker.hide(text_of(rows), sample_ids=np.arange(rows), epochs=epochs)


def decode(ids: np.ndarray) -> str:
    return TOKENIZER.decode(ids[ids < UNUSED].tolist(), skip_special_tokens=False)


def test_a_needle_is_among_the_text_and_its_number_is_the_answer_that_ends_the_block() -> None:
    blocks, answers = hide(needles(), 20)
    places = []
    for block, text, answer in zip(blocks, text_of(20), answers, strict=True):
        found = re.fullmatch(
            r"Some special magic numbers .* memorize them\.\n"
            r" One of the special magic numbers for (\S+) is: (\d{7})\.\n"
            r"What is the special magic number for \1 mentioned in the text\?\n"
            r"The special magic number for \1 mentioned in the text is( \2)",
            decode(block),
        )
        assert found
        is_answer = answer >= 0
        assert decode(answer[is_answer]) == found[3]
        assert (answer[is_answer] == block[1:][is_answer]).all()
        assert is_answer[-1]
        own = np.flatnonzero(block >= UNUSED)
        assert (block[own] == text[: len(own)]).all()  # the text goes on behind the needle
        (gap,) = [index for index, (one, other) in enumerate(pairwise(own)) if other > one + 1] or [None]
        places.append(0 if gap is None else gap + 1)
        assert len(own) - places[-1] >= WINDOW
    assert len(set(places)) > 15


@pytest.mark.parametrize("task", FREE)
def test_of_every_task_all_that_is_hidden_has_left_the_window_when_the_question_begins(task: str) -> None:
    maker = needles(tasks=(task,))
    for block, answer in zip(*hide(maker, 20), strict=True):
        last_text = np.flatnonzero(block >= UNUSED)[-1]
        assert (block[last_text - WINDOW + 1 : last_text + 1] >= UNUSED).all()
        assert decode(answer[answer >= 0]).strip()
        assert decode(block).endswith(decode(answer[answer >= 0]))


def test_tasks_are_those_of_the_suite_that_need_no_files() -> None:
    (kind, _) = get_args(NeedlesConfig.model_fields["tasks"].annotation)
    assert set(get_args(kind)) == {name for name, task in TASKS.items() if task.story is None} == set(FREE)


def test_a_share_of_the_blocks_has_needles_of_all_tasks_and_the_others_are_as_they_were() -> None:
    blocks, answers = hide(needles(share=0.25, tasks=("needle", "passkey")))
    chosen = (blocks != text_of()).any(1)
    assert (chosen == (answers >= 0).any(1)).all()
    assert abs(chosen.mean() - 0.25) < 0.12  # about four standard errors
    of_passkey = np.array(["pass key" in decode(block) for block in blocks[chosen]])
    assert 0.2 < of_passkey.mean() < 0.8


def test_draws_depend_on_seed_epoch_and_block_alone() -> None:
    blocks, answers = hide(needles(share=0.5))
    part = needles(share=0.5).hide(text_of()[7:9], sample_ids=np.array([7, 8]), epochs=0)
    assert (part[0] == blocks[7:9]).all()
    assert (part[1] == answers[7:9]).all()
    for others in (hide(needles(share=0.5, seed=1)), hide(needles(share=0.5), epochs=1)):
        assert (others[0] != blocks).any(1).mean() > 0.3


def test_blocks_without_room_are_refused_at_the_start_and_a_longer_case_leaves_its_block_as_it_is() -> None:
    with pytest.raises(UsageError, match=r"needles.tasks needle: expected blocks of at least \d+ tokens") as refusal:
        needles(block_size=90)
    least = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    text = text_of()[:, : least - 1]  # a token or two less than the longest case needs
    blocks, _ = needles(block_size=least).hide(text, sample_ids=np.arange(ROWS), epochs=0)
    assert 0 < (blocks == text).all(1).mean() < 1
