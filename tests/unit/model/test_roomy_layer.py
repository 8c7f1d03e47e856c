"""A cache layer that appends in place holds what one that copies holds, whatever is done to it."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

from metatokens.model.cache import RoomyLayer, with_room

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([0, 1])),
    "reset": lambda layer: layer.reset(),
}


def columns(generator: torch.Generator, rows: int, number: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(rows, 3, number, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(20))
def test_it_holds_what_a_copying_layer_holds(seed: int) -> None:
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    pairs = [(RoomyLayer(), DynamicLayer())]
    for _ in range(60):
        ours, plain = draw.choice(pairs)
        name = draw.choice([*OPERATIONS, "copy", "deepcopy"]) if draw.random() < 0.2 else "append"
        rows = len(plain.keys) if plain.get_seq_length() else 2
        if name == "append":
            new = columns(generator, rows, draw.choice([1, 1, 1, 2, 9]))
            with torch.inference_mode() if draw.random() < 0.2 else torch.no_grad():
                found, expected = ours.update(*new), plain.update(*new)
            assert all(map(torch.equal, found, expected))
        elif name in {"copy", "deepcopy"}:  # both go on from here
            pairs.append((getattr(copy, name)(ours), getattr(copy, name)(plain)))
        elif (name == "reset" or plain.get_seq_length() > 2) and (name != "repeat" or rows == 2):
            for layer in (ours, plain):
                OPERATIONS[name](layer)
        for ours, plain in pairs:
            assert ours.get_seq_length() == plain.get_seq_length()
            if plain.get_seq_length():
                assert torch.equal(ours.keys, plain.keys)
                assert torch.equal(ours.values, plain.values)


def test_appending_a_column_copies_none_of_the_others() -> None:
    generator, layer = torch.Generator().manual_seed(0), RoomyLayer()
    layer.update(*columns(generator, 2, 800))
    places = set()
    for _ in range(100):
        layer.update(*columns(generator, 2, 1))
        places.add(layer.keys.data_ptr())
    assert len(places) == 1
    assert layer.keys.untyped_storage().nbytes() < 1.13 * layer.keys.nbytes


def test_gradients_pass_through_it() -> None:
    generator, layer = torch.Generator().manual_seed(0), RoomyLayer()
    first, second = columns(generator, 1, 3), columns(generator, 1, 2)
    for tensor in (*first, *second):
        tensor.requires_grad_()
    layer.update(*first)
    keys, values = layer.update(*second)
    (keys.sum() + 2 * values.sum()).backward()
    assert all(
        bool((tensor.grad == scale).all())
        for pair in (first, second)
        for tensor, scale in zip(pair, (1, 2), strict=True)
    )


def test_a_cache_gets_room_where_its_layers_are_plain() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), RoomyLayer()]
    kept = cache.layers[1]
    assert [type(layer) for layer in with_room(cache).layers] == [RoomyLayer, RoomyLayer]
    assert cache.layers[1] is kept
