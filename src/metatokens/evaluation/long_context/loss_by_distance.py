"""The loss of a model on books by distance from the start of the text, under each policy, paired over books.

The text of a book begins behind its first tenth, with titles and contents. What a token can still see depends on how
far it stands from the start; so a policy that forgets loses from the distance on at which its cache is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from metatokens.config.long_context import LongContextConfig
from metatokens.evaluation.eviction import Budget, Policy, Reader
from metatokens.evaluation.long_context.material import Book, Material
from metatokens.evaluation.long_context.subject import Subject, require_finite
from metatokens.evaluation.significance import check_documents
from metatokens.evaluation.statistics import Interval, bootstrap_paired_ratio, bootstrap_ratio

SKIPPED_SHARE = 0.1  # of a book: titles, contents, prefaces
_CHARACTERS_OF_A_TOKEN = 12  # more than any tokenizer needs on average
_SHORTEST = 32


@dataclass(frozen=True)
class DistanceLoss:
    """The loss within a range of distances under one policy."""

    policy: str
    distances: tuple[int, int]
    """Tokens before the scored ones, from the first to the last."""
    nats_per_token: Interval
    difference: Interval | None
    """Nats more than under the first policy on the same books; None for the first."""
    columns: float
    """Columns when the text has been read, mean over books."""
    cache_bytes: float
    """Bytes of the cache then, mean over books."""
    nats: tuple[float, ...] = field(repr=False)
    """For each book, the mean over these tokens."""


def loss_by_distance(
    subject: Subject, material: Material, policies: Sequence[Policy], config: LongContextConfig
) -> tuple[DistanceLoss, ...]:
    """Measure the loss of every policy.

    Raises:
        UsageError: fewer books than an interval needs are long enough.
        NumericError: logits are not finite.
    """
    assert config.loss_tokens is not None
    texts = [ids for book in material.books if (ids := _text_of(book, subject, config.loss_tokens))]
    check_documents(len(texts))
    ranges = list(ranges_of(config.loss_tokens))
    results: list[DistanceLoss] = []
    first: dict[tuple[int, int], list[float]] = {}
    for policy in policies:
        nats, columns, num_bytes = _read_all(subject, policy, texts, config)
        for low, high in ranges:
            # target i, at distance i + 1
            own = nats[:, low - 1 : high].mean(1).tolist()
            ones = [1.0] * len(own)
            against = first.setdefault((low, high), own)
            is_first = policy is policies[0]
            results.append(
                DistanceLoss(
                    policy=policy.name,
                    distances=(low, high),
                    nats_per_token=bootstrap_ratio(own, ones, seed=config.seed),
                    difference=None if is_first else bootstrap_paired_ratio(own, against, ones, seed=config.seed),
                    columns=columns,
                    cache_bytes=num_bytes,
                    nats=tuple(own),
                )
            )
    return tuple(results)


def ranges_of(length: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of distances, each twice as long as the one before: 1-32, 33-64, 65-128 and so on."""
    low, high = 1, _SHORTEST
    while low < length:
        yield low, min(high, length - 1)
        low, high = high + 1, 2 * high


def _text_of(book: Book, subject: Subject, length: int) -> list[int] | None:
    start = int(SKIPPED_SHARE * len(book.text))
    start = book.text.find(" ", start) + 1
    ids = subject.encode(book.text[start : start + _CHARACTERS_OF_A_TOKEN * length])
    return ids[:length] if len(ids) >= length else None


@torch.no_grad()
def _read_all(
    subject: Subject, policy: Policy, texts: Sequence[list[int]], config: LongContextConfig
) -> tuple[npt.NDArray[np.float64], float, float]:
    """Return the nats of each target, (books, targets), and the mean columns and bytes of the caches."""
    nats, columns, num_bytes = [], [], []
    for text in texts:
        row = subject.row_of_text(text)
        budget = Budget(columns=config.columns, length=len(row.ids), sinks=config.sinks, window=config.window)
        reader = Reader(subject.model, policy, budget, separators=subject.separators)
        ids = torch.tensor([row.ids], device=subject.model.device)
        # the logits of a column score the next one, which is a target if it is text
        scored = torch.zeros(len(row.ids), dtype=torch.bool, device=ids.device)
        scored[torch.tensor(row.targets) - 1] = True
        own = []
        for start in range(0, len(row.ids), config.chunk):
            here = slice(start, min(start + config.chunk, len(row.ids)))
            logits = reader.read(ids[:, here])[0][scored[here], : subject.vocab_size]
            require_finite(logits, "the books")
            following = ids[0, 1:][scored[:-1]][int(scored[:start].sum()) :][: len(logits)]
            own.append(torch.nn.functional.cross_entropy(logits.float(), following, reduction="none"))
        nats.append(torch.cat(own).double().cpu().numpy())
        columns += reader.count_columns()
        num_bytes.append(reader.count_bytes())
    return np.stack(nats), float(np.mean(columns)), float(np.mean(num_bytes))
