"""Measures: each is one decorated function that yields what it found, document by document.

    @measure("attention", "nats", axes=("layer", "head"), test=True, positive="it sharpens the row", plot=HeadMaps())
    def sharpening(inputs: Inputs) -> Rows:
        \"\"\"Entropy of an attention row without the meta-tokens' embedding minus with it, the same row.\"\"\"
        yield from over_layers_and_heads(attention_effects(inputs).sharpening)

The function's name is the measure's id, its docstring the definition. Intervals and tests, the records of
`results.json`, the table of the guide and the figures of the page all follow from the decorator. To add a measure,
write such a function in the room that it belongs to.

Differences have one sign: positive where the meta-tokens, or what of them the measure takes away, do what the measure
is named for. So a measure of the entropy that they take from a row is `sharpening`, without minus with, and one of the
accuracy that they bring is whole minus changed. `positive` says in words what a positive number means; the test of
the registry asks every difference for it.

A row is a value of every document at some coordinates: {"layer": 3, "head": 0}, or {} for the mean over all. What
several measures need is computed once by a `shared` function. A measure that a model or its documents do not allow
raises UsageError or NumericError; it is then left out with that reason, and the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.results import Record
from metatokens.config.analysis import MINIMUM_DOCUMENTS, Part
from metatokens.errors import NumericError, UsageError
from metatokens.evaluation.significance import bca_interval, benjamini_hochberg, means_of, sign_flip_test
from metatokens.evaluation.statistics import Interval, accuracy_interval

Array = npt.NDArray[np.float64]
Coordinates: TypeAlias = Mapping[str, str | int | float]
"""What a value belongs to, by axis; an axis that is left out is averaged over."""
Statistic = Literal["mean", "ratio", "explained", "r_squared", "accuracy", "given"]
"""How the documents of a row become one number.

mean       of values (documents,)
ratio      of the sums of two columns (documents, 2): numerators, denominators
explained  1 - ratio: residual squares over total squares
r_squared  1 - residual / total, from columns (rows, sum y, sum y^2, sum of squared residuals)
accuracy   mean of shares of right answers, with an interval that holds at 0 and 1, too
given      the row has its interval already, or cannot have one, which its note tells
"""
_COLUMNS: dict[Statistic, tuple[int, ...]] = {"ratio": (2,), "explained": (2,), "r_squared": (4,)}
"""Shape of a document's values where that is not one number."""


class Row(NamedTuple):
    """What a measure found at some coordinates."""

    at: Coordinates
    values: npt.ArrayLike | Interval
    """(documents,) or (documents, columns), NaN at documents that have none; an `Interval` where the statistic is
    given."""
    num_documents: int | None = None
    """That a given interval is over."""
    note: str | None = None


Rows: TypeAlias = Iterable[Row]


# How a measure is drawn ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadMaps:
    """A heat map of layers by heads."""


@dataclass(frozen=True)
class Lines:
    """Lines over an axis with bands of intervals, one for each value of `by`, a panel for each of `panels`."""

    x: str
    by: str | None = None
    panels: str | None = None
    level: str | None = None
    """The measure of what chance gives, drawn as a dashed line."""


@dataclass(frozen=True)
class Dots:
    """A dot with its interval for each value of `x`, in colours of `by`."""

    x: str
    by: str | None = None
    level: str | None = None
    """The measure of what chance gives, drawn as a dashed line."""


Plot: TypeAlias = HeadMaps | Lines | Dots | None


# The registry --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """What is known of a measure before it runs."""

    name: str
    part: Part
    unit: str
    rows: Callable[[Inputs], Rows]
    axes: tuple[str, ...]
    """Coordinates that its rows may have."""
    statistic: Statistic
    test: bool
    """Test that the mean is 0, by sign flips; over the rows with coordinates the p-values are corrected together."""
    subject: Literal["task", "text", "graft"] | None
    """The kind of subject that it needs; None means a task or a text."""
    keep: bool
    """Leave the values of all documents in arrays.npz, as `NAME`, (documents, one axis for each of `axes`)."""
    plot: Plot
    positive: str | None
    """Of a difference: what a positive number means."""

    @property
    def definition(self) -> str:
        """The first paragraph of the function's docstring, on one line, and what a positive difference means."""
        text = " ".join((self.rows.__doc__ or "").strip().split("\n\n")[0].split())
        return text if self.positive is None else f"{text} Positive: {self.positive}."


MEASURES: dict[str, Measure] = {}
"""Every measure by its name; complete once `metatokens.analysis.run` is imported."""


def measure(
    part: Part,
    unit: str,
    *,
    axes: tuple[str, ...] = (),
    statistic: Statistic = "mean",
    test: bool = False,
    subject: Literal["task", "text", "graft"] | None = None,
    keep: bool = False,
    plot: Plot = None,
    positive: str | None = None,
) -> Callable[[Callable[[Inputs], Rows]], Callable[[Inputs], Rows]]:
    """Register the decorated function as a measure; the arguments are the fields of `Measure`.

    Raises:
        ValueError: A name that another measure has, a test or kept values of what is no mean, or a tested difference
            that does not say what a positive one means.
    """

    def register(rows: Callable[[Inputs], Rows]) -> Callable[[Inputs], Rows]:
        name = rows.__name__
        if name in MEASURES:
            raise ValueError(f"there is already a measure {name}, in {MEASURES[name].rows.__module__}")
        if (test or keep) and statistic != "mean":
            raise ValueError(f"measure {name} has the statistic {statistic}; only means are tested and kept")
        if test and positive is None:
            raise ValueError(f"measure {name} is tested against 0; say with positive= what a positive number means")
        MEASURES[name] = Measure(name, part, unit, rows, axes, statistic, test, subject, keep, plot, positive)
        return rows

    return register


# From rows to records ------------------------------------------------------------------------------------------


def run_measure(chosen: Measure, inputs: Inputs) -> list[Row]:
    """Return what a measure found; nothing, with the reason noted, where it could not run.

    Raises:
        ValueError: rows that are not what the measure was declared to yield.
    """
    try:
        rows = list(chosen.rows(inputs))
    except (UsageError, NumericError) as error:
        inputs.skip(f"{chosen.part}: {error}")
        return []
    _check(chosen, rows)
    if chosen.keep and any(len(row.at) == len(chosen.axes) for row in rows):  # a measure may find nothing
        inputs.arrays[chosen.name] = _by_axes(rows, chosen.axes)
    return rows


def record_of(chosen: Measure, row: Row, *, seed: int) -> Record:
    """Return the record of a row: its statistic with an interval and, where it is tested, a p-value."""
    p_value: float | None = None
    interval: Interval | None
    if isinstance(row.values, Interval):
        interval, count, note = row.values, row.num_documents or 0, row.note
    else:
        values = np.asarray(row.values, dtype=np.float64)
        values = values[np.isfinite(values).all(axis=tuple(range(1, values.ndim)))]
        count = len(values)
        interval, note = _interval(values, chosen.statistic, seed=seed)
        if chosen.test and count >= MINIMUM_DOCUMENTS:
            p_value = sign_flip_test(values, seed=seed)
    interval = finite_interval(interval)
    return Record(
        measure=chosen.name,
        unit=chosen.unit,
        at={axis: np.asarray(place).item() for axis, place in row.at.items()},  # numpy's numbers among them
        value=interval and interval.estimate,
        low=interval and interval.low,
        high=interval and interval.high,
        num_documents=count,
        p_value=p_value,
        note=note if interval else "no document has it",
    )


def finite_interval(interval: Interval | None) -> Interval | None:
    """Return an interval without bounds where one is no finite number, and None where the estimate is none."""
    if interval is None or not math.isfinite(interval.estimate):
        return None
    is_bounded = all(bound is not None and math.isfinite(bound) for bound in (interval.low, interval.high))
    return interval if is_bounded else Interval(interval.estimate, None, None)


def correct(records: Sequence[Record]) -> list[Record]:
    """Return the records with the p-values of each measure's rows corrected together (false discovery rate)."""
    families: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record.p_value is not None and record.at:
            families.setdefault(record.measure, []).append(index)
    corrected = list(records)
    for indices in families.values():
        adjusted = benjamini_hochberg([records[index].p_value or 0.0 for index in indices])
        for index, value in zip(indices, adjusted.tolist(), strict=True):
            corrected[index] = records[index].model_copy(update={"adjusted_p": value})
    return corrected


def _check(chosen: Measure, rows: Sequence[Row]) -> None:
    """Raise ValueError for rows that are not what the measure was declared to yield."""
    unknown = {axis for row in rows for axis in row.at} - set(chosen.axes)
    if unknown:
        raise ValueError(f"measure {chosen.name} has rows by {', '.join(sorted(unknown))}, which its axes do not name")
    places = [frozenset(row.at.items()) for row in rows]
    if len(set(places)) < len(places):
        raise ValueError(f"measure {chosen.name} has several rows at the same coordinates")
    wanted = "an interval" if chosen.statistic == "given" else _form(("documents", *_COLUMNS.get(chosen.statistic, ())))
    for row in rows:
        shape = () if isinstance(row.values, Interval) else np.shape(row.values)
        found = "an interval" if isinstance(row.values, Interval) else _form(("documents", *shape[1:]) if shape else ())
        if found != wanted:
            raise ValueError(f"measure {chosen.name} ({chosen.statistic}) yielded {found}, not {wanted}")


def _form(shape: tuple[str | int, ...]) -> str:
    return f"values ({', '.join(map(str, shape))})" if shape else "a single number"


def _interval(values: Array, statistic: Statistic, *, seed: int) -> tuple[Interval | None, str | None]:
    """Return the statistic of documents with its interval, and why it has none."""
    if not len(values):
        return None, None
    few = None if len(values) >= MINIMUM_DOCUMENTS else f"fewer than {MINIMUM_DOCUMENTS} documents: no interval"
    if statistic == "accuracy":
        found = accuracy_interval([values], seed=seed)
        return (Interval(found.estimate, None, None), few) if few else (found, None)
    function = _FUNCTIONS[statistic]
    if few:
        return Interval(float(function(values[None])[0]), None, None), few
    found = bca_interval(values, function, seed=seed)
    return found, None if finite_interval(found) == found else "undefined in some resamples: no interval"


def _ratios_of_sums(resamples: Array) -> Array:
    above, below = np.moveaxis(resamples.sum(axis=1), -1, 0)
    return _divide(above, below)


def _explained(resamples: Array) -> Array:
    return 1 - _ratios_of_sums(resamples)


def _r_squared(resamples: Array) -> Array:
    rows, total, squares, residuals = np.moveaxis(resamples.sum(axis=1), -1, 0)
    spread = squares - _divide(total**2, rows)
    return 1 - _divide(residuals, np.where(spread > 0, spread, 0))


def _divide(above: Array, below: Array) -> Array:
    """Return quotients, NaN where the divisor is 0."""
    quotients: Array = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return quotients


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "mean": means_of,
    "ratio": _ratios_of_sums,
    "explained": _explained,
    "r_squared": _r_squared,
}


# Rows of arrays --------------------------------------------------------------------------------------------------


def rows_over(values: npt.ArrayLike, *axes: Sequence[str | int | float], names: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each place of an array.

    Args:
        values: (documents, one axis for each name, ...).
        *axes: the coordinates along each axis.
        names: of the axes.
    """
    array = np.asarray(values, dtype=np.float64)
    for place in np.ndindex(*(len(axis) for axis in axes)):
        at = {name: axis[index] for name, axis, index in zip(names, axes, place, strict=True)}
        yield Row(at, array[(slice(None), *place)])


def over_layers(values: Array) -> Iterator[Row]:
    """Yield the rows of (documents, layers, ...), one for each layer."""
    yield from rows_over(values, range(values.shape[1]), names=("layer",))


def over_layers_and_heads(values: Array) -> Iterator[Row]:
    """Yield the rows of (documents, layers, heads), one for each head, and their mean, NaN left out."""
    yield from rows_over(values, range(values.shape[1]), range(values.shape[2]), names=("layer", "head"))
    flat = values.reshape(len(values), -1)
    counts = np.isfinite(flat).sum(axis=1)
    sums = np.where(np.isfinite(flat), flat, 0).sum(axis=1)
    yield Row({}, np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0))


def _by_axes(rows: Sequence[Row], axes: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the values of the rows that have all axes, which are counted from 0, as one array."""
    full: dict[tuple[int, ...], Array] = {
        tuple(int(row.at[axis]) for axis in axes): np.asarray(row.values, dtype=np.float64)
        for row in rows
        if len(row.at) == len(axes)
    }
    sizes = [1 + max(place[index] for place in full) for index in range(len(axes))]
    kept = np.full((len(next(iter(full.values()))), *sizes), np.nan, dtype=np.float32)
    for place, values in full.items():
        index: tuple[slice | int, ...] = (slice(None), *place)
        kept[index] = values
    return kept
