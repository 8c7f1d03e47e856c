"""Blocks with needles: a task of the long-context suite with the block's own text as filler and the answer at its end.

All that is hidden has left the window when the question begins. Items of the suite differ from these blocks in filler
and draws alone, so what a graft can do is told by tasks that it was not trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metatokens.data.injection import IGNORE_INDEX, IntArray
from metatokens.data.keyed_random import KeyedRandom, Purpose, hash_key
from metatokens.errors import UsageError
from metatokens.evaluation.long_context.items import check_answer
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.tasks import find_task

if TYPE_CHECKING:
    from metatokens.config.grafting import NeedlesConfig
    from metatokens.data.tokenizer import TextEncoder

_STEPS = 1 << 32  # of a share
_TRIES = 16  # cases drawn of each task to find one without room


class Needles:
    """What hides needles in blocks of a run.

    Args:
        config: the share of the blocks, and the tasks.
        encoder: of the text.
        window: tokens of text that a token sees, itself among them.
        block_size: N, text tokens of a block.
        seed: of the run.

    Raises:
        UsageError: blocks have no room for one of the tasks, or the tokenizer joins its answer with the question.
    """

    def __init__(self, config: NeedlesConfig, *, encoder: TextEncoder, window: int, block_size: int, seed: int) -> None:
        self._config, self._encoder, self._window, self._seed = config, encoder, window, seed
        self._material = Material()
        for name in config.tasks:
            cases = (self._draw(name, KeyedRandom(number))[0] for number in range(_TRIES))
            if (least := max(sum(map(len, pieces)) for pieces in cases) + window - 1) > block_size:
                raise UsageError(
                    f"needles.tasks {name}",
                    expected=f"blocks of at least {least} tokens, with a window between what is hidden and asked",
                    found=f"data.block_size {block_size}",
                    remedy="raise data.block_size, lower graft.window, or leave the task out",
                )

    def hide(self, text: IntArray, *, sample_ids: IntArray, epochs: IntArray | int) -> tuple[IntArray, IntArray]:
        """Return the blocks (B, N + 1) with needles in a share of them, and the answers among their targets (B, N).

        Targets that are no answer are -100. A pure function of the blocks, their ids and their epochs. A block without
        room, for a case longer than most, stays as it is.
        """
        hidden, answers = text.copy(), np.full_like(text[:, 1:], IGNORE_INDEX)
        for row, key in enumerate(hash_key(self._seed, epochs, sample_ids, Purpose.NEEDLE).tolist()):
            draw = KeyedRandom(key)
            if draw.below(_STEPS) >= self._config.share * _STEPS:
                continue
            (before, *sentences, whole), num_answer = self._draw(draw.choose(self._config.tasks), draw)
            num_filler = text.shape[1] - sum(map(len, (before, *sentences, whole)))
            if num_filler < self._window:
                continue
            places = sorted(draw.between(0, num_filler - self._window) for _ in sentences)
            block = before
            for start, stop, ids in zip((0, *places), (*places, num_filler), (*sentences, whole), strict=True):
                block = [*block, *text[row, start:stop], *ids]
            hidden[row] = block
            answers[row, -num_answer:] = block[-num_answer:]
        return hidden, answers

    def _draw(self, name: str, draw: KeyedRandom) -> tuple[list[list[int]], int]:
        """Return the ids of a case, as opening, hidden sentences, question with answer, and how many the answer has."""
        case = find_task(name).draw(draw, self._material)
        question = f"\n{case.after}"
        pieces = (f"{case.before}\n", *(f" {sentence}" for sentence in case.hidden), question, question + case.answer)
        *others, asked, whole = (ids.tolist() for ids in self._encoder.encode_batch(pieces))
        check_answer(case.answer, asked, whole, name=name)
        return [*others, whole], len(whole) - len(asked)
