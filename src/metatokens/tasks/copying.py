"""Copying (paper section 3): reproduce a span of a text exactly.

The span stands between two meta-tokens, in a text of random words.

Input, and targets for the two kinds of loss:

    input  Text :     skirt _ [   fog  hand gear _ ]    head  onion cape .    Copy 1 :   fog  hand gear
    answer -    -     -     - -   -    -    -    - -    -     -     -    -    -    - fog hand gear -
    full   :    skirt -     [ fog hand gear -    ] head onion cape  .    Copy 1    : fog hand gear -

The meta-tokens mark the span, and a bracket stands right after each for models without them. `size` is the number of
words of a span. Several questions are several spans, in the order of the text; they do not overlap. A longer prompt has
more words around the spans; one of these words ends the text, or at least `distance` do. Words may repeat. With
`meta_places` decoy, the same number of pairs of meta-tokens stands around stretches of the same length, and the
brackets stay. The stretches cut no span in two, and are spans as often as by chance. Without `marks` there are no
brackets. With `symbols` the spans have this many different words and the rest of the text has others, so a model that
has lost a span can only guess among them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from metatokens.data.keyed_random import KeyedRandom
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
from metatokens.tasks.words import ITEMS

if TYPE_CHECKING:
    from metatokens.config.tasks import CopyingTask

_WORDS = frozenset(f" {item}" for item in ITEMS)


def generate(
    task: CopyingTask, size: int, length_range: LengthRange, *, encoder: PieceEncoder, random: KeyedRandom
) -> Instance | None:
    """Draw spans of `size` words and the words around them; None if the prompt misses the range."""
    of_spans, of_text = (ITEMS, ITEMS) if task.symbols is None else (ITEMS[: task.symbols], ITEMS[task.symbols :])
    spans = [[f" {random.choose(of_spans)}" for _ in range(size)] for _ in range(task.questions)]
    num_behind = task.distance or 1
    questions = [Question([" Copy", f" {number}", ":"], span) for number, span in enumerate(spans, start=1)]
    around = fill_prompt(
        length_range,
        encoder.count(("Text", ":", "."))
        + sum(encoder.count((" [", *span, " ]")) for span in spans)
        + count_question_tokens(questions, encoder),
        lambda: [f" {random.choose(of_text)}"],
        encoder=encoder,
        random=random,
        num_parts=(num_behind, length_range.highest),
    )
    if around is None:
        return None
    places = sorted(random.below(len(around) - num_behind + 1) for _ in spans)
    words = list(around)
    ends: list[tuple[int, int]] = []
    for place, span in zip(places, spans, strict=True):
        start = place + len(ends) * size
        words[start:start] = [[word] for word in span]
        ends.append((start, start + size))
    decoys = None
    if task.meta_places.kind == "decoy":
        starts = [_draw_decoy(len(words) - size, size, ends, random) for _ in spans]  # no span ends the text
        decoys = [end for start in starts for end in (start, start + size)]
    marked = [(end, bracket) for span_ends in ends for end, bracket in zip(span_ends, (" [", " ]"), strict=True)]
    return assemble(["Text", ":", *interleave(words, mark_places(task, marked, decoys)), "."], questions)


def _draw_decoy(num_starts: int, size: int, ends: list[tuple[int, int]], random: KeyedRandom) -> int:
    """Draw where a stretch starts that cuts no span in two, and is a span as often as by chance alone.

    One that cuts a span is drawn anew, among those that are no span either, unless the spans fill the text.
    """
    cuts = {place for start, stop in ends for place in range(start + 1, stop)}
    if not cuts & {(drawn := random.below(num_starts)), drawn + size}:
        return drawn
    whole = [start for start in range(num_starts) if not cuts & {start, start + size}]
    beside = [start for start in whole if (start, start + size) not in ends]
    return random.choose(beside or whole)


def solve(prompt_text: str) -> list[str]:
    """Return the answer to each question of a prompt, from the text alone."""
    return [span.strip() for span in re.findall(r"\[([^\[\]]+)\]", prompt_text)]


def chance(task: CopyingTask, instance: Instance) -> float:
    """Return the share of right answers of copying any stretch of the text as long as the span and not at its end.

    With `symbols`, by which the text alone shows the span, that of one who has lost it and draws each of its words.
    """
    start, stop = instance.answer_pieces[0]
    if task.symbols is not None:
        return float(task.symbols) ** (start - stop)
    num_words = sum(piece in _WORDS for piece in instance.pieces[: instance.body_stop])
    return 1 / (num_words - (stop - start))
