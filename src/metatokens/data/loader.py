"""The loader: it cuts token shards into blocks and makes training batches of them.

Block i of a split is tokens [i N, i N + N] of its concatenated shards: N inputs and the last target. Tokens after
the last whole block are dropped. The order of an epoch is a keyed permutation of the blocks, computed on the fly
without an index in memory or on disk. A batch is a pure function of the step, so the loader's whole state is one
integer: after a resume, and with any number of devices or prefetch depth, the global batches hold the same samples
with the same layouts. The training process reads each block with one pread; one thread may work ahead.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from metatokens.data.injection import (
    BoolArray,
    InjectedBatch,
    IntArray,
    inject_meta_tokens,
    sample_meta_positions,
    warn_without_meta_tokens,
)
from metatokens.data.keyed_random import Purpose, Uint64Array, hash_key, splitmix64
from metatokens.data.reconstruction import repeat_spans
from metatokens.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from metatokens.config.schema import Injection, LossPolicy, ReconstructConfig
    from metatokens.data.shards import Split, TokenDataset

_FEISTEL_ROUNDS = 6  # 4 already make a strong pseudorandom permutation (Luby, Rackoff 1988); 2 more for weak rounds


def permute(indices: IntArray, num_items: int, keys: Uint64Array) -> IntArray:
    """Return where a keyed pseudorandom permutation of range(num_items) sends each index.

    A Feistel network on the least even number of bits that holds `num_items` (at least 4) is applied until the result
    is in the range (cycle walking; Black, Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). This is a bijection
    for every key, in constant memory; from 5 items on it takes fewer than 4 applications on average.

    Args:
        indices: (B,) int64 in [0, num_items).
        num_items: The size of the permuted range.
        keys: (B,) or (1,) uint64 from `hash_key`, which permutation to apply to each index.

    Returns:
        (B,) int64.
    """
    half_bits = max(2, ((num_items - 1).bit_length() + 1) // 2)
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    round_keys = [splitmix64(keys ^ np.uint64(r)) for r in range(_FEISTEL_ROUNDS)]
    words = indices.astype(np.uint64)
    round_keys = [np.broadcast_to(key, words.shape) for key in round_keys]
    walking = np.arange(len(words))
    while len(walking):
        left, right = words[walking] >> shift, words[walking] & half_mask
        for key in round_keys:
            left, right = right, left ^ (splitmix64(right ^ key[walking]) & half_mask)
        words[walking] = (left << shift) | right
        walking = walking[words[walking] >= num_items]
    return words.astype(np.int64)


class TokenBlocks:
    """The blocks of one split, read by index.

    Args:
        dataset: Verified shards.
        split: Which split.
        text_tokens: N, text tokens in a block.

    Raises:
        UsageError: The split has no whole block.
    """

    def __init__(self, dataset: TokenDataset, split: Split, text_tokens: int) -> None:
        self.dataset = dataset
        self.split = split
        self.text_tokens = text_tokens
        num_tokens = dataset.num_tokens(split)
        self._num_blocks = max(0, num_tokens - 1) // text_tokens
        if self._num_blocks == 0:
            raise UsageError(
                f"{dataset.path}, split {split}",
                expected=f"at least {text_tokens + 1} tokens, one block of {text_tokens} and its last target",
                found=f"{num_tokens} tokens in {len(dataset.manifest.shards)} shards of both splits",
                remedy="prepare more text, or lower data.block_size"
                + (
                    ", or prepare it with a larger --validation-fraction, or pass --evaluation.interval_steps null"
                    if split == "validation"
                    else ""
                ),
            )

    def __len__(self) -> int:
        """Return the number of whole blocks."""
        return self._num_blocks

    def read(self, indices: IntArray) -> IntArray:
        """Return the blocks (B,) as (B, N + 1) int64: N inputs and the token that follows.

        Raises:
            DataError: A shard was truncated.
        """
        blocks = np.empty((len(indices), self.text_tokens + 1), dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            blocks[row] = self.dataset.read(self.split, index * self.text_tokens, self.text_tokens + 1)
        return blocks


class Batch(Protocol):
    """A batch as the training loop sees it."""

    @property
    def input_ids(self) -> IntArray:
        """(B, T)."""

    @property
    def num_rows(self) -> int:
        """B."""

    @property
    def num_targets(self) -> int:
        """Loss terms."""

    @property
    def num_text(self) -> int:
        """Text tokens, padding left out."""

    @property
    def num_meta(self) -> int:
        """Meta-tokens."""

    def to_model_inputs(self, rows: slice = ..., device: torch.device | str = ...) -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments for some rows."""


class Batches(ABC):
    """Batches by step number, of any kind.

    Attributes:
        seconds_waited: Time that consumers of `prefetch` have spent waiting for a batch.
    """

    seconds_waited: float = 0.0

    @abstractmethod
    def batch_at(self, step: int) -> Batch:
        """Return this rank's rows of global batch `step`; a pure function, in any order, of any step."""

    @abstractmethod
    def sample_ids(self, step: int) -> list[int]:
        """Return the ids of the samples of global batch `step`, of all ranks, for the record."""

    def prefetch(self, start_step: int, stop_step: int, depth: int = 2) -> Generator[Batch, None, None]:
        """Yield the batches of steps [start_step, stop_step); one thread makes up to `depth` of them ahead.

        An error in the thread is raised here. Closing the generator ends the thread.
        """
        steps = iter(range(start_step, stop_step))
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            pending = deque(thread.submit(self.batch_at, step) for step in islice(steps, depth))
            try:
                while pending:
                    started = time.perf_counter()
                    batch = pending.popleft().result()
                    self.seconds_waited += time.perf_counter() - started
                    pending.extend(thread.submit(self.batch_at, step) for step in islice(steps, 1))
                    yield batch
            finally:
                for batch_ahead in pending:
                    batch_ahead.cancel()


class BatchLoader(Batches):
    """Batches by step number, with meta-tokens inserted.

    Row r of global batch s is position p = s G + r of the global stream: block permute(p mod n) of epoch p // n, where
    n is the number of blocks. A batch may straddle two epochs. Rank r has rows [r G / W, (r + 1) G / W) of a global
    batch of G blocks, so the ranks' batches in order are the batch of a single process.

    Args:
        blocks: The text.
        injection: Policy of the meta-tokens; it inserts block_size - blocks.text_tokens of them.
        block_size: T, positions of a sequence.
        batch_blocks: G, blocks of a global batch.
        seed: Key of the order and of the layouts.
        rank: This process.
        world_size: W, the number of processes.
        meta_token_id: The id to insert.
        loss_policy: Which position predicts which text token.
        ends_clause: (V,) bool, needed by the policy punctuation.
        reconstruct: Which blocks end with an earlier span of their text; None means none.

    Raises:
        ValueError: The blocks do not fit the block size.
        UsageError: The world size does not divide the batch, or the split has
            fewer blocks than a batch.
    """

    def __init__(  # noqa: PLR0913 - all that a batch depends on
        self,
        blocks: TokenBlocks,
        *,
        injection: Injection,
        block_size: int,
        batch_blocks: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        meta_token_id: int,
        loss_policy: LossPolicy,
        ends_clause: BoolArray | None = None,
        reconstruct: ReconstructConfig | None = None,
    ) -> None:
        self.blocks, self._reconstruct = blocks, reconstruct
        self._injection, self._block_size, self._batch_blocks = injection, block_size, batch_blocks
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._meta_token_id, self._loss_policy, self._ends_clause = meta_token_id, loss_policy, ends_clause
        self._check()

    def batch_at(self, step: int) -> InjectedBatch:
        """Return this rank's rows of global batch `step`; a pure function, in any order, of any step."""
        return self.make_batch(*self.samples_at(step))

    def make_batch(self, sample_ids: IntArray, epochs: IntArray | int) -> InjectedBatch:
        """Return the given blocks (B,) with the layouts that they have in the given epochs."""
        text = self.blocks.read(sample_ids)
        if self._reconstruct is not None:
            text = repeat_spans(text, self._reconstruct, sample_ids=sample_ids, seed=self._seed, epochs=epochs)
        meta_positions = sample_meta_positions(
            self._injection,
            sample_ids=sample_ids,
            block_size=self._block_size,
            seed=self._seed,
            epoch=epochs,
            text=text,
            ends_clause=self._ends_clause,
        )
        return inject_meta_tokens(
            text, meta_positions, meta_token_id=self._meta_token_id, loss_policy=self._loss_policy
        )

    def sample_ids(self, step: int) -> list[int]:
        """Return the blocks of global batch `step`, of all ranks."""
        blocks: list[int] = self._samples(step * self._batch_blocks, self._batch_blocks)[0].tolist()
        return blocks

    def samples_at(self, step: int) -> tuple[IntArray, IntArray]:
        """Return the blocks and the epochs, (B,) int64 each, of this rank's rows of global batch `step`."""
        num_rows = self._batch_blocks // self._world_size
        return self._samples(step * self._batch_blocks + self._rank * num_rows, num_rows)

    def _samples(self, first: int, num_rows: int) -> tuple[IntArray, IntArray]:
        """Return the blocks and the epochs of some positions of the global stream."""
        epochs, positions = np.divmod(np.arange(first, first + num_rows), len(self.blocks))
        return permute(positions, len(self.blocks), hash_key(self._seed, epochs, Purpose.SAMPLE_ORDER)), epochs

    def _check(self) -> None:
        if self._batch_blocks % self._world_size:
            allowed = [str(w) for w in range(1, self._batch_blocks + 1) if self._batch_blocks % w == 0]
            raise UsageError(
                f"training.batch_blocks {self._batch_blocks}",
                expected=f"one of {', '.join(allowed)} processes, so that each gets as many blocks",
                found=str(self._world_size),
                remedy="change training.batch_blocks or the number of processes",
            )
        num_meta = self._injection.num_meta(self._block_size)
        warn_without_meta_tokens(self._injection, num_meta, f"a block of {self._block_size}")
        if self.blocks.text_tokens + num_meta != self._block_size:
            text = self._block_size - num_meta
            raise ValueError(f"blocks must hold {text} text tokens beside meta-tokens, not {self.blocks.text_tokens}")
        if len(self.blocks) < self._batch_blocks:
            raise UsageError(
                f"{self.blocks.dataset.path}, split {self.blocks.split}",
                expected=f"at least one batch of {self._batch_blocks} blocks of {self.blocks.text_tokens} tokens",
                found=f"{len(self.blocks)} blocks, {self.blocks.dataset.num_tokens(self.blocks.split)} tokens",
                remedy="prepare more text, or lower training.batch_blocks",
            )
