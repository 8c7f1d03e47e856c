"""Position coupling (Cho et al. 2024): tokens that belong together share a position, so that length is no obstacle.

A token is given the number of its group, from 1 on, or 0 for none, and stands at position 0 if it has none, else at
its group's number plus a start that is the same for the whole row. The start is drawn in training, so that all
positions are trained, and 0 otherwise.

    list_recall   List child : 1 corn , 2 jar . List student : 1 canoe , 2 feather . Item 2 of child is jar
    items         0    0     0 1 1    1 2 2   0 0    0       0 1 1     1 2 2       0 2    2 2  2     2  2

    copying       Text : skirt [ fog hand gear ] head onion cape . Copy 1 : fog hand gear
    span          0    0 0     1 2   3    4    0 0    0     0    0 1    1 1 2   3    4

With `items`, item j of every list is a group, with its number and its comma, and so are a question about item j and its
answer. With `span`, token i of a span and of its answer are a group, and the mark before the span and the question are
the group before the first; further spans have the groups behind these. A meta-token belongs to the token before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from metatokens.config.tasks import CopyingTask
from metatokens.errors import UsageError
from metatokens.tasks.base import META

if TYPE_CHECKING:
    from metatokens.config.tasks import Task
    from metatokens.data.injection import IntArray
    from metatokens.tasks.base import Instance, PieceEncoder


def couple_tokens(instance: Instance, task: Task, encoder: PieceEncoder) -> IntArray | None:
    """Return the group of each text token of an instance, (N,) int64, or None for a task without coupling."""
    if getattr(task, "coupling", None) is None:
        return None
    if isinstance(task, CopyingTask):
        groups = _couple_spans(instance, task, encoder)
    else:
        groups = _couple_items(instance, encoder)
    return np.array(groups, dtype=np.int64)


def check_coupling(task: Task, config: Any) -> None:
    """Refuse a task with coupling for a model that cannot place tokens as it says.

    Args:
        task: The task.
        config: The model's.

    Raises:
        UsageError: The model has no table of positions of its own, or counts tokens in another way.
    """
    if getattr(task, "coupling", None) is None:
        return
    encoding = getattr(config, "position_encoding", f"those of a {config.model_type}")
    others = [name for name in ("position_range", "memory") if getattr(config, name, None) is not None]
    if encoding != "learned" or others:
        raise UsageError(
            "task.coupling",
            expected="a model of this package with learned positions, and neither position_range nor memory",
            found=", ".join([f"positions {encoding}", *others]),
            remedy="set task.coupling off, or train a model with position_encoding learned",
        )


def _couple_items(instance: Instance, encoder: PieceEncoder) -> list[int]:
    groups: list[int] = []
    item = 0
    for piece in instance.pieces[: instance.body_stop]:
        if piece in ("List", " List", ".", " |"):
            item = 0
        groups += [item] * len(encoder.ids(piece))
        if piece in (":", ","):
            item += 1
    start = instance.body_stop
    for answer_start, stop in instance.answer_pieces:
        pieces = instance.pieces[start:stop]
        asked = next(int(piece) for piece in instance.pieces[start:answer_start] if piece.strip().isdigit())
        groups += [asked] * encoder.count(pieces)
        start = stop
    return groups


def _couple_spans(instance: Instance, task: CopyingTask, encoder: PieceEncoder) -> list[int]:
    lengths = [encoder.count(instance.pieces[start:stop]) for start, stop in instance.answer_pieces]
    first = np.cumsum([1, *(length + 1 for length in lengths)]).tolist()
    opens, closes = (" [", " ]") if task.marks else (META, META)
    groups: list[int] = []
    span, group = 0, 0
    for piece in instance.pieces[: instance.body_stop]:
        if group and piece == closes:
            span, group = span + 1, 0
        elif piece == opens and (task.marks or not group):
            group = first[span]
            groups += [group] * len(encoder.ids(piece))
            continue
        for _ in encoder.ids(piece):
            group += group > 0
            groups.append(group)
    start = instance.body_stop
    for number, (answer_start, stop) in enumerate(instance.answer_pieces):
        groups += [first[number]] * encoder.count(instance.pieces[start:answer_start])
        groups += range(first[number] + 1, first[number] + 1 + lengths[number])
        start = stop
    return groups
