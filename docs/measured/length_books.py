"""The books of experiments/length-generalisation: what is lost in windows of L, and in longer ones."""

import math
from functools import partial
from operator import mul
from statistics import fmean
from typing import Any

from measured.length_cells import (
    MULTIPLES,
    cells_of,
    encodings_with_more,
    is_more,
    mean_of,
    names_of,
    over_encodings,
    seeds_to_text,
)
from measured.source import table


def _nats(cell: Any, window: str) -> dict[int, float]:
    """Return the nats per word on books, seed by seed, in windows of L, 2 L or 4 L."""
    row = cell["perplexities"][MULTIPLES.index(window)]
    return dict(zip(row["seeds"], row["by_seed"], strict=True))


def _longer(cell: Any, window: str) -> dict[int, float]:
    """Return by how much more a model of books loses in a longer window than in L, seed by seed."""
    return {seed: nats - _nats(cell, "L")[seed] for seed, nats in _nats(cell, window).items()}


def _reads_on(cell: Any) -> bool:
    return max(_longer(cell, "4 L").values()) < 0


def books_table(sweep: str) -> str:
    """Write every arm of a sweep on books: nats per word, what longer windows change, and what it cost."""
    rows = []
    for (position, arm), cell in cells_of(sweep).items():
        changes = [seeds_to_text(_longer(cell, window), "+.2f") for window in ("2 L", "4 L")]
        changes[-1] = f"**{changes[-1]}**" if _reads_on(cell) else changes[-1]
        costs = [f"{cell['parameters']:,}", f"{mean_of(cell, 'training_flops') / 1e12:.1f}"]
        rows.append(
            [*([position, arm] if position else [arm]), seeds_to_text(_nats(cell, "L"), ".2f"), *changes, *costs]
        )
    first = ["positions", "arm"] if any(position for position, _ in cells_of(sweep)) else ["arm"]
    return table([*first, "L", "2 L - L", "4 L - L", "parameters", "10^12 operations"], rows)


def books_reading_on(arm: str) -> str:
    """Return the encodings that lose less in windows of 4 L than of L with every seed of an arm, or "no encoding"."""
    return names_of(position for (position, own), cell in cells_of("books").items() if own == arm and _reads_on(cell))


def books_arms_reading_on() -> str:
    """Return which ways to keep old text lose less in windows of 4 L than of L with every seed, or "no arm"."""
    return names_of((arm for (_, arm), cell in cells_of("memory-books").items() if _reads_on(cell)), "arm")


def books_arms_beside_full(window: str, *, more: bool) -> str:
    """Return which ways to keep old text lose more, or less, than full attention with every seed, or "no arm"."""
    nats = {arm: _nats(cell, window) for (_, arm), cell in cells_of("memory-books").items()}
    full = nats.pop("full")
    return names_of((arm for arm, own in nats.items() if is_more(*((own, full) if more else (full, own)))), "arm")


def books_arm_minus(first: str, second: str, window: str = "L") -> str:
    """Return by how much more one way to keep old text loses than another, seed by seed."""
    own, other = (_nats(cells_of("memory-books")["", arm], window) for arm in (first, second))
    return seeds_to_text({seed: own[seed] - other[seed] for seed in own}, "+.3f")


def books_longer(sweep: str, position: str, arm: str, window: str = "4 L") -> str:
    """Return by how much more a model loses in a longer window than in L, seed by seed."""
    return seeds_to_text(_longer(cells_of(sweep)[position, arm], window), "+.3f")


def books_pooled(first: str, second: str) -> str:
    """Return by how much more an arm loses than another in windows of L, seed by seed; the mean over encodings."""

    def difference(own: Any, other: Any, seed: int) -> float:
        return _nats(own, "L")[seed] - _nats(other, "L")[seed]

    return seeds_to_text(over_encodings("books", first, second, difference), "+.2f")


def books_added_range(positions: str, first: str, second: str) -> str:
    """Return how much more windows of 4 L add to an arm's loss than to another's, from the least seed to the most."""
    cells = [
        (cells_of("books")[position, first], cells_of("books")[position, second]) for position in positions.split()
    ]
    more = [_longer(own, "4 L")[seed] - _longer(other, "4 L")[seed] for own, other in cells for seed in own["seeds"]]
    return f"{min(more):.2f} to {max(more):.2f}"


def books_added_pooled(first: str, second: str) -> str:
    """Return how much more windows of 4 L add to the loss of an arm than of another, the mean over encodings."""

    def more(own: Any, other: Any, seed: int) -> float:
        return _longer(own, "4 L")[seed] - _longer(other, "4 L")[seed]

    return seeds_to_text(over_encodings("books", first, second, more), "+.3f")


def _by_context(cell: Any) -> list[float]:
    return [bucket["nats_per_token"] for bucket in cell["perplexities"][0]["by_context"]]


def books_gap_by_context(first: str, second: str) -> str:
    """Return by how many nats a token an arm loses more, at the first token of a window and at all later ones."""
    cells = cells_of("books")
    pairs = [(_by_context(cells[name, first]), _by_context(cells[name, second])) for name, arm in cells if arm == first]
    gaps = [[a - b for a, b in zip(own, other, strict=True)] for own, other in pairs]
    start, *later = [fmean(of_bucket) for of_bucket in zip(*gaps, strict=True)]
    return f"{start:.2f} nats a token at the first of a window, {min(later):.2f} to {max(later):.2f} at all later ones"


def books_tiled_and_sliding(position: str, arm: str) -> str:
    """Return the nats per token in windows of L that do not overlap, and in sliding ones."""
    row = cells_of("books")[position, arm]["perplexities"][0]
    # every window is full, so a bucket has as many tokens as it spans
    spans = [bucket["highest"] - bucket["lowest"] + 1 for bucket in row["by_context"]]
    tiled = sum(map(mul, spans, _by_context(cells_of("books")[position, arm]))) / sum(spans)
    return f"{tiled:.2f} and {math.log(row['perplexity']):.2f}"


def books_worse_than_plain(arm: str) -> int:
    """Return in how many encodings an arm loses more than the text alone in windows of L, with every seed."""
    nats = {key: _nats(cell, "L") for key, cell in cells_of("books").items()}
    return len(encodings_with_more(nats, arm, "plain"))


TABLES = {
    "length-books": partial(books_table, "books"),
    "length-memory-books": partial(books_table, "memory-books"),
}
NAMES = (
    books_added_pooled,
    books_added_range,
    books_arm_minus,
    books_arms_beside_full,
    books_arms_reading_on,
    books_gap_by_context,
    books_longer,
    books_pooled,
    books_reading_on,
    books_tiled_and_sliding,
    books_worse_than_plain,
)
