"""Where the token view opens: at the place that predicts the answer, in the head that reads most from meta-tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metatokens.analysis.results import TokenView

Arrays = Mapping[str, npt.NDArray[Any]]


def opening_view(views: Sequence[TokenView]) -> int:
    """Return the index of the view to open: the prompt of a minimal pair, else the first; 0 of none."""
    return next((index for index, view in enumerate(views) if "patch_effect" in view.arrays), 0)


def opening_of(view: TokenView, arrays: Arrays) -> dict[str, Any]:
    """Return the query, layer and head that a view opens with.

    The query of a minimal pair's prompt is its last token, which predicts the answer; of other texts it is the token
    whose successor gains most from the meta-tokens. The head is that whose query row has most weight on meta-tokens;
    the mean over heads of the first layer where attention is kept in part, or no meta-token stands before the query.
    """
    query = len(view.tokens) - 1
    if "patch_effect" not in view.arrays and {"loss_with", "loss_without"} <= view.arrays.keys():
        gain = arrays[view.arrays["loss_without"]] - arrays[view.arrays["loss_with"]]
        if np.isfinite(gain[1:]).any():
            query = int(np.nanargmax(gain[1:]))
    opened: dict[str, Any] = {"query": query, "layer": 0, "head": "mean"}
    if "attention" not in view.arrays:
        return opened
    row = arrays[view.arrays["attention"]][:, :, query].astype(np.float64) ** 2  # bytes hold the root of the weight
    mass = row[:, :, np.array(view.is_meta)].sum(-1)
    if mass.any():
        layer, head = np.unravel_index(int(mass.argmax()), mass.shape)
        opened |= {"layer": int(layer), "head": str(head)}
    return opened
