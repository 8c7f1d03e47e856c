"""The cache of a grafted model: that of memory mode, whose length is the text that was read, without anchors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from metatokens.errors import UsageError
from metatokens.graft.spreading import policy_of
from metatokens.model.memory import MemoryPolicy
from metatokens.model.memory_cache import MemoryDynamicLayer, MemoryState


class GraftState(MemoryState):
    """The columns of a cache; knows how many columns of input were read too."""

    num_columns: int = 0
    """Tokens and padding given to the model."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_columns = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all that is known, by name."""
        return {**super().to_tensors(), "num_columns": torch.tensor(self.num_columns)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `to_tensors` returned."""
        super().restore(tensors)
        self.num_columns = int(tensors["num_columns"])


class GraftLayer(MemoryDynamicLayer):
    """Keys and values of the columns that are left."""

    _layer_type = "metatokens_graft"
    state: GraftState

    def __init__(self, state: GraftState, *, leads: bool) -> None:
        """Share a state, which the first layer leads."""
        super().__init__()
        self.join(state, leads=leads)

    def get_seq_length(self) -> int:
        """Return the number of columns of input that were read, evicted ones too."""
        return self.state.num_columns

    def activate_past_recording(self) -> None:
        """Refuse.

        Raises:
            UsageError: always.
        """
        self._refuse()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back.

        Raises:
            UsageError: unless there is nothing to remove.
        """
        if tokens_to_remove:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "cache of a grafted model",
            expected="reading forward alone",
            found="going back, as assisted generation does",
            remedy="generate without an assistant",
        )


def new_cache(policy: MemoryPolicy, num_layers: int) -> DynamicCache:
    """Return an empty cache for a grafted model."""
    cache = DynamicCache()
    _fit(cache, policy, num_layers)
    return cache


def state_of(cache: Cache, config: Any, num_layers: int) -> GraftState:
    """Return the state of a cache; an empty one of transformers is made into one of a graft, in place.

    Raises:
        UsageError: it is of another kind, or another model has filled it.
    """
    policy = policy_of(config)
    layers = cache.layers
    if layers and all(isinstance(layer, GraftLayer) for layer in layers):
        state = cast("GraftState", layers[0].state)
        if state.policy == policy:
            return state
        found = "one of a graft with another window or other anchors"
    elif type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in layers):
        found = f"a {type(cache).__name__} of another kind"
    elif cache.get_seq_length():
        found = "one that was filled without the graft"
    else:
        return _fit(cache, policy, num_layers)
    raise UsageError(
        "cache of a grafted model", expected="an empty DynamicCache or its own", found=found, remedy="use a new one"
    )


def _fit(cache: Any, policy: MemoryPolicy, num_layers: int) -> GraftState:
    state = GraftState(policy)
    cache.layers = [GraftLayer(state, leads=index == 0) for index in range(num_layers)]
    cache.layer_class_to_replicate = None
    return state


def is_filled(cache: Cache | None) -> bool:
    """Tell whether a cache holds columns of a grafted model."""
    return cache is not None and any(isinstance(layer, GraftLayer) and layer.get_seq_length() for layer in cache.layers)
