import os
import threading

import numpy as np
import pytest

from metatokens.config.schema import (
    ExplicitInjection,
    NoInjection,
    PunctuationInjection,
    ReconstructConfig,
    UniformInjection,
)
from metatokens.data.keyed_random import hash_key
from metatokens.data.loader import BatchLoader, TokenBlocks, permute
from metatokens.data.tokenizer import ends_clause_table
from metatokens.errors import DataError

BLOCK_SIZE, META = 32, 400


def make_loader(dataset, split="train", **changes):
    injection = changes.pop("injection", UniformInjection(ratio=0.25))
    blocks = TokenBlocks(dataset, split, BLOCK_SIZE - injection.num_meta(BLOCK_SIZE))
    arguments = {
        "injection": injection,
        "block_size": BLOCK_SIZE,
        "batch_blocks": 6,
        "seed": 1,
        "meta_token_id": META,
        "loss_policy": "skip",
    }
    return BatchLoader(blocks, **(arguments | changes))


@pytest.mark.parametrize("num_items", [1, 2, 3, 10, 17, 1000, 24_414])
def test_permute_is_a_bijection_for_every_size(num_items):
    for key in (hash_key(0), hash_key(7, 3)):
        result = permute(np.arange(num_items), num_items, key)
        assert sorted(result.tolist()) == list(range(num_items))


def test_permute_differs_between_keys_and_takes_one_key_per_index():
    indices, keys = np.arange(500), np.concatenate([hash_key(0), hash_key(1)])
    first, second = permute(indices, 500, keys[:1]), permute(indices, 500, keys[1:])
    assert (first == second).mean() < 0.05
    mixed = permute(indices, 500, np.repeat(keys, 250))
    np.testing.assert_array_equal(mixed, np.concatenate([first[:250], second[250:]]))


def test_permute_leaves_no_correlation_between_neighbours():
    order = permute(np.arange(50_000), 1_000_003, hash_key(3)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02


def test_blocks_tile_the_split_with_one_token_of_overlap(dataset):
    blocks = TokenBlocks(dataset, "train", 24)
    rows = blocks.read(np.arange(len(blocks)))
    assert rows.shape == ((dataset.num_tokens("train") - 1) // 24, 25)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows[:, :-1].ravel(), dataset.read("train", 0, rows[:, 1:].size))
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])


def test_a_batch_whose_blocks_repeat_a_span_keeps_its_layout_and_the_targets_of_its_text(dataset):
    plain = make_loader(dataset).batch_at(3)
    spans = make_loader(dataset, reconstruct=ReconstructConfig(share=1, tokens=4, distance=6)).batch_at(3)
    np.testing.assert_array_equal(spans.input_ids == META, plain.input_ids == META)
    texts = spans.input_ids[spans.input_ids != META].reshape(6, 24)
    # the repetition begins among the inputs, and its last token is the last target alone
    assert [row[-3:].tolist() in [row[i : i + 3].tolist() for i in range(21)] for row in texts] == [True] * 6
    np.testing.assert_array_equal(texts[:, :-3], plain.input_ids[plain.input_ids != META].reshape(6, 24)[:, :-3])


def test_block_too_short_for_a_meta_token_warns(dataset):
    with pytest.warns(UserWarning, match="uniform puts no meta-token into a block of 32"):
        make_loader(dataset, injection=UniformInjection(ratio=0.01))


def test_split_shorter_than_a_block_is_a_usage_error_with_the_numbers(dataset, fails):
    num_tokens = dataset.num_tokens("validation")
    with fails(2, "validation", num_tokens + 1, num_tokens):
        TokenBlocks(dataset, "validation", num_tokens)


def test_batch_holds_text_metas_and_targets_of_its_samples(dataset):
    loader = make_loader(dataset)
    batch = loader.batch_at(3)
    sample_ids, epochs = loader.samples_at(3)
    text = loader.blocks.read(sample_ids)
    assert batch.input_ids.shape == batch.targets.shape == (6, BLOCK_SIZE)
    assert batch.meta_positions.shape == (6, 8)
    assert epochs.tolist() == [0] * 6
    np.testing.assert_array_equal(batch.input_ids[batch.input_ids != META].reshape(6, -1), text[:, :-1])


def test_batch_is_a_pure_function_of_its_step(dataset):
    forwards = [make_loader(dataset).batch_at(step) for step in range(5)]
    loader = make_loader(dataset)
    for step in reversed(range(5)):
        for a, b in zip(loader.batch_at(step), forwards[step], strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_epoch_has_every_block_once_in_another_order(dataset):
    loader = make_loader(dataset, batch_blocks=7)
    num_blocks = len(loader.blocks)
    drawn = [loader.samples_at(step) for step in range(3 * num_blocks // 7 + 1)]
    sample_ids, epochs = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    orders = [sample_ids[epochs == epoch].tolist() for epoch in range(3)]
    assert num_blocks % 7, "a batch must straddle two epochs for this test to mean something"
    assert all(sorted(order) == list(range(num_blocks)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_block_gets_another_layout_in_the_next_epoch(dataset):
    loader = make_loader(dataset, batch_blocks=1)
    layouts = {}
    for step in range(2 * len(loader.blocks)):
        sample_ids, _ = loader.samples_at(step)
        layouts.setdefault(int(sample_ids[0]), []).append(loader.batch_at(step).meta_positions[0].tolist())
    assert all(first != second for first, second in layouts.values())


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_in_order_make_the_batch_of_one_process(dataset, world_size):
    alone = make_loader(dataset).batch_at(50)
    ranks = [make_loader(dataset, rank=rank, world_size=world_size).batch_at(50) for rank in range(world_size)]
    for field in range(3):
        np.testing.assert_array_equal(np.concatenate([rank[field] for rank in ranks]), alone[field])


def test_blocks_of_choice_have_the_layouts_of_their_epoch_however_they_are_put_together(dataset):
    loader = make_loader(dataset)
    for a, b in zip(loader.make_batch(*loader.samples_at(9)), loader.batch_at(9), strict=True):
        np.testing.assert_array_equal(a, b)
    together, alone = loader.make_batch(np.arange(5), 0), [loader.make_batch(np.array([i]), 0) for i in range(5)]
    for field in range(3):
        np.testing.assert_array_equal(np.concatenate([batch[field] for batch in alone]), together[field])


@pytest.mark.parametrize("injection", [NoInjection(), ExplicitInjection(positions=(0, 9))])
def test_loader_serves_policies_without_a_draw(dataset, injection):
    batch = make_loader(dataset, injection=injection).batch_at(0)
    assert batch.meta_positions.tolist() == [list(getattr(injection, "positions", ()))] * 6


def test_loader_serves_punctuation_with_a_clause_table(dataset):
    table = ends_clause_table(dataset.tokenizer())
    batch = make_loader(dataset, injection=PunctuationInjection(ratio=0.1), ends_clause=table).batch_at(0)
    before = np.take_along_axis(batch.input_ids, np.maximum(batch.meta_positions - 1, 0), axis=1)
    assert table[before[before != META]].mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"world_size": 4}, ["batch_blocks 6", "1, 2, 3, 6"]),
        ({"batch_blocks": 100_000}, ["100000 blocks", "prepare more text"]),
    ],
)
def test_impossible_batch_is_a_usage_error_with_the_numbers(dataset, fails, changes, words):
    with fails(2, *words):
        make_loader(dataset, **changes)


def test_blocks_of_another_size_are_a_value_error_with_the_numbers(dataset):
    with pytest.raises(ValueError, match=r"48 text tokens .* not 24"):
        make_loader(dataset, block_size=64)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_gives_the_same_batches_for_any_depth(dataset, depth):
    loader = make_loader(dataset)
    batches = list(loader.prefetch(4, 9, depth=depth))
    assert len(batches) == 5
    for step, batch in enumerate(batches, start=4):
        np.testing.assert_array_equal(batch.input_ids, loader.batch_at(step).input_ids)
    assert loader.seconds_waited > 0


def test_prefetch_ends_its_thread_when_it_is_closed_early(dataset):
    batches = make_loader(dataset).prefetch(0, 10**9)
    next(batches)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_prefetch_raises_what_went_wrong_in_its_thread(dataset):
    batches = make_loader(dataset).prefetch(0, 1000)
    next(batches)
    for shard in dataset.manifest.shards:
        os.truncate(dataset.path / shard.name, 0)  # the batches made ahead are not touched
    with pytest.raises(DataError, match="found 0 bytes"):
        list(batches)
