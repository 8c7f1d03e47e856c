"""Parity (paper section 3): the exclusive or of all bits before a mark.

A meta-token stands right after the bits to be summed; the bits after it do not count.

Input, and targets for the two kinds of loss:

    input  Bits : 1 _ | 1 1 0 1 _ | 0 0 0 .      Parity 1  is 1 .      Parity 2  is 0
    answer -    - - - - - - - - - - - - - -      -      -  1  - -      -      -  0  -
    full   :    1 - | 1 1 0 1 - | 0 0 0 . Parity 1      is 1  . Parity 2      is 0  -

The meta-token tells where to stop, and a bar stands right after it for models without one. `size` is the number of bits
before the last mark. Several questions are several marks at different places, numbered from the left and answered in
order at the end, each with all bits before it. The marks before the last are drawn uniformly from the places between
bits. A longer prompt has more bits after the last mark; at least one stands there. With `meta_places` decoy, the same
number of meta-tokens stands after bits drawn independently of the marks, and the bars stay. Without `marks` there are
no bars.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from metatokens.data.keyed_random import KeyedRandom
from metatokens.errors import UsageError
from metatokens.tasks.base import (
    Instance,
    LengthRange,
    PieceEncoder,
    Question,
    assemble,
    count_question_tokens,
    fill_prompt,
    interleave,
    mark_places,
)

if TYPE_CHECKING:
    from metatokens.config.tasks import ParityTask


def generate(
    task: ParityTask, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
) -> Instance | None:
    """Draw `size` bits, the marks among them and the bits after them; None if the prompt misses the range."""
    if task.questions > size:
        raise UsageError(
            "parity.questions",
            expected=f"at most {size}, a mark after each bit",
            found=str(task.questions),
            remedy="lower it, or raise the lower bound of difficulty.size",
        )
    bits = [random.below(2) for _ in range(size)]
    marks = sorted((size, *islice(random.shuffle(range(1, size)), task.questions - 1)))
    questions = [
        Question([" Parity", f" {number}", " is"], [f" {sum(bits[:mark]) % 2}"])
        for number, mark in enumerate(marks, start=1)
    ]
    bits_after = fill_prompt(
        length_range,
        encoder.count(("Bits", ":", *(f" {bit}" for bit in bits), *(" |" for _ in marks), "."))
        + count_question_tokens(questions, encoder),
        lambda: [f" {random.below(2)}"],
        encoder=encoder,
        random=random,
        num_parts=(1, length_range.highest),
    )
    if bits_after is None:
        return None
    all_bits = [[f" {bit}"] for bit in bits] + bits_after
    decoys = None
    if task.meta_places.kind == "decoy":
        decoys = list(islice(random.shuffle(range(1, len(all_bits))), len(marks)))
    inserted = mark_places(task, [(mark, " |") for mark in marks], decoys)
    return assemble(["Bits", ":", *interleave(all_bits, inserted), "."], questions)


def solve(prompt_text: str) -> list[str]:
    """Return the answer to each question of a prompt, from the text alone."""
    parity, answers = "0", []
    for symbol in prompt_text.partition(".")[0].replace("| |", "|"):
        if symbol == "1":
            parity = "1" if parity == "0" else "0"
        elif symbol == "|":
            answers.append(parity)
    return answers


def chance(task: ParityTask, instance: Instance) -> float:
    """Return the share of right answers of either bit."""
    del task, instance
    return 0.5
