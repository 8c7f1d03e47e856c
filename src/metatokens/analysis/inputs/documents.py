"""Documents, the unit that a bootstrap draws again (see `metatokens.evaluation.statistics`), and sums over each.

Tokens of one document are not independent; so a measurement keeps, for every document, the sum of its values and how
many they are. The mean over all tokens is then a ratio of sums over documents, for which `bootstrap_ratio` has the
interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
from torch import Tensor

from metatokens.errors import UsageError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One text or one instance of a task, as the model reads it."""

    name: str
    input_ids: Tensor
    """(1, T) int64, meta-tokens among them."""
    is_meta: Tensor
    """(1, T) bool."""


@dataclass(frozen=True)
class DocumentSums:
    """What was measured in each document, summed."""

    documents: IntArray
    """(num_documents,) ids, rising."""
    sums: FloatArray
    """(num_documents, ...)."""
    counts: FloatArray
    """(num_documents, ...), how many values each sum holds; may have axes of length 1 where `sums` has longer ones."""

    @classmethod
    def of_values(cls, documents: npt.ArrayLike, values: npt.ArrayLike) -> DocumentSums:
        """Sum values (n, ...) of documents (n,); a value that is NaN does not exist and is not counted."""
        numbers = np.asarray(values, dtype=np.float64)
        exists = ~np.isnan(numbers)
        return cls.of_sums(documents, np.where(exists, numbers, 0), exists.astype(np.float64))

    @classmethod
    def of_sums(cls, documents: npt.ArrayLike, sums: npt.ArrayLike, counts: npt.ArrayLike) -> DocumentSums:
        """Add up the rows that belong to the same document.

        Args:
            documents: (n,) integers.
            sums: (n, ...).
            counts: (n, ...), broadcasts with `sums`.

        Raises:
            UsageError: the three do not have as many rows.
        """
        rows, above, below = np.asarray(documents, dtype=np.int64), np.asarray(sums, np.float64), np.asarray(counts)
        if rows.ndim != 1 or not len(rows) == len(above) == len(below):
            raise UsageError(
                "documents",
                expected="one id for every row that was measured",
                found=f"shapes {rows.shape}, {above.shape} and {below.shape}",
                remedy="pass as many ids as rows",
            )
        ids, group = np.unique(rows, return_inverse=True)
        return cls(ids, _add_rows(group, len(ids), above), _add_rows(group, len(ids), below))

    @property
    def means(self) -> FloatArray:
        """(num_documents, ...), NaN where a document has no value."""
        counts = np.broadcast_to(self.counts, self.sums.shape)
        return _divide(self.sums, counts)

    @property
    def mean(self) -> FloatArray:
        """(...), over all values of all documents; NaN where there is none."""
        counts = np.broadcast_to(self.counts.sum(0), self.sums.shape[1:])
        return _divide(self.sums.sum(0), counts)

    def __sub__(self, other: DocumentSums) -> DocumentSums:
        """Return the sums of the differences of values that were measured in pairs.

        Raises:
            UsageError: other documents, or other counts: then nothing is paired.
        """
        same = np.array_equal(self.documents, other.documents) and np.array_equal(self.counts, other.counts)
        if not same:
            raise UsageError(
                "difference of two measurements",
                expected="the same documents with as many values in each",
                found=f"{len(self.documents)} and {len(other.documents)} documents whose counts differ",
                remedy="measure both at the same pairs",
            )
        return DocumentSums(self.documents, self.sums - other.sums, self.counts)


def merge_documents(parts: Sequence[DocumentSums]) -> DocumentSums:
    """Add up what was measured in several batches; a document may be spread over them.

    Raises:
        UsageError: no batch.
    """
    if not parts:
        raise UsageError(
            "documents", expected="one to measure", found="none", remedy="choose documents that have meta-tokens"
        )

    def merge(first: DocumentSums, second: DocumentSums) -> DocumentSums:
        return DocumentSums.of_sums(
            np.concatenate([first.documents, second.documents]),
            np.concatenate([first.sums, second.sums]),
            np.concatenate([first.counts, second.counts]),
        )

    return reduce(merge, parts)


def choose_other_documents(documents: npt.ArrayLike, *, seed: int) -> IntArray:
    """Return for each row (n,) the index of a row of another document; a permutation, pure in its arguments.

    Rows are put in an order where those of one document stand together, and each takes the row that stands as far
    behind it as the largest document is long.

    Raises:
        UsageError: one document has more than half of the rows, so that no such permutation exists.
    """
    rows = np.asarray(documents, dtype=np.int64)
    _, group, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    if len(rows) < 2 * sizes.max():
        raise UsageError(
            "control with shuffled documents",
            expected="rows of at least two documents, none with more than half of the rows",
            found=f"{sizes.max()} of {len(rows)} rows in one document",
            remedy="put more documents into a batch",
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    rank_of_group = generator.permutation(len(sizes))
    order = np.lexsort((generator.permutation(len(rows)), rank_of_group[group]))
    partners = np.empty(len(rows), dtype=np.int64)
    partners[order] = np.roll(order, -int(sizes.max()))
    return partners


def _divide(sums: npt.ArrayLike, counts: FloatArray) -> FloatArray:
    means: FloatArray = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means


def _add_rows(group: npt.NDArray[np.intp], num_groups: int, values: npt.NDArray[np.generic]) -> FloatArray:
    sums = np.zeros((num_groups, *values.shape[1:]))
    np.add.at(sums, group, values)
    return sums
