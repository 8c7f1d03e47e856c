"""Documents: one text or one instance of a task, and the unit that every interval and test draws again.

Tokens of one document are not independent; so a measure gives one value, or one pair of sums, for each document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

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


def sum_by_document(documents: npt.ArrayLike, values: npt.ArrayLike) -> FloatArray:
    """Return the sum of values (n,) over the rows of each document (n,), in the order of the documents' ids."""
    _, group = np.unique(np.asarray(documents), return_inverse=True)
    return np.bincount(group, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)


def choose_other_documents(num_documents: int, *, seed: int) -> IntArray:
    """Return the index of another document for each, (num_documents,): a permutation, pure in its arguments.

    Raises:
        ValueError: fewer than 2 documents.
    """
    if num_documents < 2:
        raise ValueError(f"another document needs at least 2, not {num_documents}")
    order = np.argsort(np.random.Generator(np.random.PCG64(seed)).permutation(num_documents))
    partners = np.empty(num_documents, dtype=np.int64)
    partners[order] = np.roll(order, -1)
    return partners
