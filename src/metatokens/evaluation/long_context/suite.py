"""The suite: every task at every length under every policy, scored by exact match on the same texts.

An answer is right if each of its tokens is the most likely text token at its place: what greedy decoding writes begins
with the answer. All of a text is read under the policy, the answer too. Scores have Wilson's interval, and differences
from the first policy are paired over texts (Newcombe 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metatokens.config.analysis import MINIMUM_DOCUMENTS
from metatokens.config.long_context import LongContextConfig
from metatokens.errors import UsageError
from metatokens.evaluation.eviction import Budget, Policy, Reader
from metatokens.evaluation.eviction.policies import find_policy
from metatokens.evaluation.long_context.items import Item, make_item
from metatokens.evaluation.long_context.loss_by_distance import DistanceLoss, loss_by_distance
from metatokens.evaluation.long_context.material import Material
from metatokens.evaluation.long_context.peak import peak_memory
from metatokens.evaluation.long_context.subject import Row, Subject, require_finite
from metatokens.evaluation.long_context.tasks import find_task
from metatokens.evaluation.statistics import Interval, paired_shares_interval, wilson_interval

RESULT_FORMAT = "long-context/1"
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ScoreRow:
    """One task at one length under one policy."""

    task: str
    length: int
    policy: str
    accuracy: Interval
    difference: Interval | None
    """Accuracy minus that of the first policy on the same texts; None for the first."""
    columns: float
    """Columns of the fullest layer when a text has been read, mean over texts; a second cache counts too."""
    cache_bytes: float
    """Keys, values and other states of all layers then, mean over texts."""
    peak_bytes: int | None
    """The largest memory in use while these texts were read, weights included."""
    right: tuple[bool, ...] = field(repr=False)
    """For each text, whether its answer is right."""
    depths: tuple[float, ...] = field(repr=False)
    """For each text, where in it the sentence with the answer stands."""


@dataclass(frozen=True)
class LongContextReport:
    """The result of `metatokens evaluate --suite long-context`."""

    format: str
    model: str
    parameters: int
    config: dict[str, Any]
    rows: tuple[ScoreRow, ...]
    losses: tuple[DistanceLoss, ...]


def evaluate_long_context(
    subject: Subject, config: LongContextConfig, *, name: str = "", progress: Progress | None = None
) -> LongContextReport:
    """Run the suite.

    Args:
        subject: the model, on the device where it is to run.
        config: what to measure.
        name: of the model, for the report.
        progress: called with a line of text and the share that is done after each batch.

    Raises:
        UsageError: a name is unknown, there are fewer texts than an interval needs, a length has no room for a task or
            exceeds the model, an answer has no token, or the model's columns cannot be dropped.
        DataError: books or stories are missing or malformed.
        NumericError: logits are not finite.
    """
    policies = [find_policy(one) for one in config.policies]
    material = check_suite(subject, config)
    steps = len(config.lengths) * len(config.tasks) * len(policies)
    done = 0
    rows: list[ScoreRow] = []
    for length in config.lengths:
        for task_name in config.tasks:
            items = make_items(task_name, length, subject, material, config)
            first: Sequence[bool] | None = None
            for policy in policies:
                row = _score(subject, items, policy, config, task=task_name, length=length, first=first)
                first = row.right if first is None else first
                rows.append(row)
                done += 1
                if progress:
                    progress(f"{task_name}, {length}, {policy.name}", done / steps)
    losses = loss_by_distance(subject, material, policies, config) if config.loss_tokens else ()
    tree = config.model_dump(mode="json")
    return LongContextReport(RESULT_FORMAT, name, subject.model.num_parameters(), tree, tuple(rows), losses)


def check_suite(subject: Subject, config: LongContextConfig) -> Material:
    """Make every check that needs no reading, and return the material.

    Raises:
        UsageError: as `evaluate_long_context`.
        DataError: as `evaluate_long_context`.
    """
    for policy in config.policies:
        for length in config.lengths:
            Reader(subject.model, find_policy(policy), _budget(config, length))
    tasks = [find_task(one) for one in config.tasks]
    if tasks and config.instances < MINIMUM_DOCUMENTS:
        raise UsageError(
            "instances",
            expected=f"at least {MINIMUM_DOCUMENTS}, which an interval needs",
            found=str(config.instances),
            remedy="raise instances",
        )
    for length in config.lengths if tasks else ():
        subject.check_length(length, "lengths")
    if config.loss_tokens:
        subject.check_length(config.loss_tokens, "loss_tokens")
    material = Material(haystack=config.haystack, books=config.books, babi=config.babi, max_books=config.max_books)
    for one in tasks:
        if one.story is not None:
            material.stories(one.story)
        if one.hides_in == "books" or config.haystack == "books":
            _ = material.books
    if config.loss_tokens:
        _ = material.books
    return material


def make_items(
    task_name: str, length: int, subject: Subject, material: Material, config: LongContextConfig
) -> list[Item]:
    """Return the texts of one task at one length."""
    return [
        make_item(find_task(task_name), length, encoder=subject, material=material, seed=config.seed, index=index)
        for index in range(config.instances)
    ]


def _budget(config: LongContextConfig, length: int) -> Budget:
    return Budget(columns=config.columns, length=length, sinks=config.sinks, window=config.window)


def _score(
    subject: Subject,
    items: Sequence[Item],
    policy: Policy,
    config: LongContextConfig,
    *,
    task: str,
    length: int,
    first: Sequence[bool] | None,
) -> ScoreRow:
    rows = [subject.row_of(item) for item in items]
    # of all rows, so that what a policy keeps does not depend on the batches
    budget = _budget(config, max(len(row.ids) for row in rows))
    right: list[bool] = []
    columns: list[int] = []
    cache_bytes = 0
    with peak_memory(subject.model.device) as peak:
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            reader = Reader(subject.model, policy, budget, separators=subject.separators)
            right += answers_are_right(subject, reader, batch, config.chunk)
            columns += reader.count_columns()
            cache_bytes += reader.count_bytes()
    return ScoreRow(
        task=task,
        length=length,
        policy=policy.name,
        accuracy=wilson_interval(sum(right), len(right)),
        difference=None if first is None else paired_shares_interval(right, first),
        columns=float(np.mean(columns)),
        cache_bytes=cache_bytes / len(rows),
        peak_bytes=peak.num_bytes,
        right=tuple(right),
        depths=tuple(item.depth for item in items),
    )


def answers_are_right(subject: Subject, reader: Reader, batch: Sequence[Row], chunk: int) -> list[bool]:
    """Read the rows of a batch and tell for each whether its answer is what greedy decoding would write.

    Raises:
        NumericError: logits are not finite.
    """
    wanted = max(len(row.ids) - row.targets[0] for row in batch) + 1
    for logits, is_last in read_padded(reader, batch, chunk=chunk, last=wanted):
        if is_last:
            require_finite(logits, "the answers")
            best = logits[..., : subject.vocab_size].argmax(-1).tolist()
    right = []
    for row, written in zip(batch, best, strict=True):
        # the logits of column c are at c - (T - wanted)
        shift = len(row.ids) - wanted
        right.append(all(written[column - 1 - shift] == row.ids[column] for column in row.targets))
    return right


def read_padded(reader: Reader, batch: Sequence[Row], *, chunk: int, last: int) -> Iterator[tuple[Tensor, bool]]:
    """Read rows that end together, padded at the left; yield the logits of each chunk, and whether it is the last.

    Args:
        reader: a new one.
        batch: the rows.
        chunk: tokens of a forward pass.
        last: tokens at the end that are read at once, with all of their logits; of the others one logit is made.
    """
    device = reader.model.device
    longest = max(len(row.ids) for row in batch)
    last = min(last, longest)
    ids = torch.tensor([[0] * (longest - len(row.ids)) + row.ids for row in batch], device=device)
    mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in batch], device=device)
    for start in range(0, longest - last, chunk):
        here = slice(start, min(start + chunk, longest - last))
        yield reader.read(ids[:, here], mask[:, here], logits_to_keep=1), False
    yield reader.read(ids[:, longest - last :], mask[:, longest - last :]), True
