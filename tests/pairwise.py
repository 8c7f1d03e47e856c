"""Few cases out of a product of many: every two values meet in some case, and hardly more often than they must.

A fault of the models shows where two things meet (a padded row in a static cache, a scaled rotation in a packed
stream); three or more are rarely needed at once. All pairs take about as many cases as the two longest factors have
together, the product has a thousand.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, combinations, product
from typing import Any

import pytest


def all_pairs(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Return a `parametrize` over the arguments that the keywords name, in which each two of their values meet."""
    values = {name: tuple(choices) for name, choices in factors.items()}
    return pytest.mark.parametrize(tuple(values), cover_pairs(values))


def cover_pairs(factors: Mapping[str, tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return cases, a value of each factor in their order, that hold every two values of two factors.

    Greedy and the same in every process: each case is the first of those with the most pairs that no case holds yet.
    """

    def pairs_of(case: tuple[int, ...]) -> Iterator[Any]:
        return combinations(enumerate(case), 2)

    numbers = [range(len(values)) for values in factors.values()]
    candidates = list(product(*numbers))
    bit_of = {pair: 1 << bit for bit, pair in enumerate({*chain(*map(pairs_of, candidates))})}
    bits_of = {case: sum(bit_of[pair] for pair in pairs_of(case)) for case in candidates}
    missing = (1 << len(bit_of)) - 1
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: (bits_of[case] & missing).bit_count())
        missing &= ~bits_of[best]
        chosen.append(best)
    columns = list(factors.values())
    return [tuple(columns[factor][number] for factor, number in enumerate(case)) for case in sorted(chosen)]
