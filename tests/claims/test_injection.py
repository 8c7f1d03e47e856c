"""The paper's facts about injection (section 3), and what this implementation promises on top of them.

M = k n meta-tokens in every block, at positions drawn uniformly without a period; no loss is paid for predicting
a meta-token, and every text token is predicted exactly once.
"""

from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatokens.config.schema import UniformInjection
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions

SIGMAS = 4.0  # two-sided: a sound generator fails such a test once in 16,000 seeds; the seeds here are fixed


def layouts(num_samples: int, block_size: int, ratio: float, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return sample_meta_positions(
        UniformInjection(ratio=ratio),
        sample_ids=np.arange(num_samples),
        block_size=block_size,
        seed=seed,
        epoch=epoch,
    )


def chi_squared_sigmas(statistic: float, degrees: int) -> float:
    """Return how many standard deviations a chi-squared statistic is off, by Wilson and Hilferty (1931)."""
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / sqrt(2 / (9 * degrees))


def test_every_block_has_round_k_n_metas_at_the_papers_sizes():
    assert layouts(10, 1024, 0.1).shape == (10, 102)


def test_uniform_hits_every_position_alike():
    num_samples, block_size = 20_000, 256
    drawn = layouts(num_samples, block_size, 0.1)
    share = drawn.shape[1] / block_size
    counts = np.bincount(drawn.ravel(), minlength=block_size)
    # positions of one block exclude each other: variance n p (1 - p), and T - 1 degrees of freedom after scaling
    statistic = ((counts - num_samples * share) ** 2).sum() / (num_samples * share * (1 - share))
    statistic *= (block_size - 1) / block_size
    assert abs(chi_squared_sigmas(statistic, block_size - 1)) < SIGMAS


def test_uniform_draws_every_subset_alike_when_all_can_be_counted():
    num_samples, block_size, num_meta = 40_000, 7, 3
    drawn = layouts(num_samples, block_size, num_meta / block_size)
    codes = (1 << drawn).sum(axis=1)
    counts = np.array([(codes == sum(1 << p for p in subset)).sum() for subset in combinations(range(7), num_meta)])
    assert counts.sum() == num_samples
    expected = num_samples / len(counts)
    statistic = ((counts - expected) ** 2).sum() / expected
    assert abs(chi_squared_sigmas(statistic, len(counts) - 1)) < SIGMAS


@pytest.mark.parametrize("distance", [1, 2, 10, 128])
def test_uniform_has_no_period_at_any_distance(distance):
    num_samples, block_size = 5_000, 256
    is_meta = np.zeros((num_samples, block_size), dtype=bool)
    drawn = layouts(num_samples, block_size, 0.1, seed=1)
    np.put_along_axis(is_meta, drawn, True, axis=1)
    pairs = (is_meta[:, distance:] & is_meta[:, :-distance]).sum(axis=1)
    num_meta = drawn.shape[1]
    expected = (block_size - distance) * num_meta * (num_meta - 1) / (block_size * (block_size - 1))
    assert abs(pairs.mean() - expected) < SIGMAS * pairs.std() / sqrt(num_samples)


def test_layouts_never_repeat_across_seeds_epochs_and_samples():
    seen = {
        row.tobytes()
        for seed in (0, 1, 2**62)
        for epoch in (0, 1, 2, 3)
        for row in layouts(10_000, 256, 0.1, seed=seed, epoch=epoch)
    }
    assert len(seen) == 120_000


def test_layouts_and_batches_are_the_same_for_any_number_of_processes(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(" ".join(str(n * n + i) for n in range(200)))
    prepare(
        str(tmp_path / "corpus"),
        tmp_path / "tokens",
        tokenizer=None,
        vocab_size=300,
        validation_fraction=0,
        shard_tokens=5000,
        options=SourceOptions(),
    )
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        blocks = TokenBlocks(dataset, "train", 58)

        def batch(step: int, rank: int, world_size: int) -> list[np.ndarray]:
            loader = BatchLoader(
                blocks,
                injection=UniformInjection(ratio=0.1),
                block_size=64,
                batch_blocks=8,
                seed=5,
                rank=rank,
                world_size=world_size,
                meta_token_id=dataset.vocab_size,
                loss_policy="skip",
            )
            return list(loader.batch_at(step))

        last_step_of_epoch = len(blocks) // 8
        for step in (0, 1, last_step_of_epoch, 1000):
            alone = batch(step, 0, 1)
            for world_size in (2, 4, 8):
                ranks = [batch(step, rank, world_size) for rank in range(world_size)]
                for field in range(3):
                    np.testing.assert_array_equal(np.concatenate([r[field] for r in ranks]), alone[field])


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["skip", "retarget"]))
def test_every_text_token_has_exactly_one_loss_term(data, loss_policy):
    num_text, num_meta = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 12))
    block_size, meta_token_id = num_text + num_meta, 10_000
    num_rows = data.draw(st.integers(1, 4))
    drawn = [sorted(data.draw(st.permutations(range(block_size)))[:num_meta]) for _ in range(num_rows)]
    text = np.arange(num_rows * (num_text + 1)).reshape(num_rows, num_text + 1)  # every token is another
    layout = np.array(drawn, dtype=np.int64).reshape(num_rows, num_meta)
    batch = inject_meta_tokens(text, layout, meta_token_id=meta_token_id, loss_policy=loss_policy)
    for row in range(num_rows):
        input_ids, targets = batch.input_ids[row].tolist(), batch.targets[row].tolist()
        assert [token for token in input_ids if token != meta_token_id] == text[row, :-1].tolist()
        assert [i for i, token in enumerate(input_ids) if token == meta_token_id] == layout[row].tolist()
        # in order, each once; the first token was the last target of the block before
        assert [target for target in targets if target != -100] == text[row, 1:].tolist()
        for position, target in enumerate(targets[:-1]):
            if loss_policy == "skip" and target != -100:
                assert input_ids[position + 1] == target
            if loss_policy == "retarget":
                assert (target == -100) == (input_ids[position] == meta_token_id)
