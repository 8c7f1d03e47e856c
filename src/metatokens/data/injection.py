"""Injection: where meta-tokens go in a block, and which token each position then has to predict.

Meta-tokens are never stored. They are inserted between text tokens when a batch is made (paper section 3: M = k n
per block, at positions drawn uniformly at random, without a period). A counter-based generator makes every draw a
pure function of (seed, epoch, sample), so batch size, rank, worker and resume do not change it. With the same key,
the layout at a lower ratio is a subset of the layout at a higher one.

Deviation: M meta-tokens come out of the block, they do not extend it: T positions hold round(k T) of them.

Shapes: B batch, T positions of a block, N text tokens, M meta-tokens, T = N + M, V vocabulary.
The import needs numpy only. Nothing here knows a model, a tokenizer or a file.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from metatokens.data.keyed_random import GOLDEN_GAMMA, Purpose, Uint64Array, hash_key, splitmix64
from metatokens.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from metatokens.config.schema import Injection, LossPolicy

IntArray: TypeAlias = npt.NDArray[np.int64]
TokenArray: TypeAlias = npt.NDArray[np.integer]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

IGNORE_INDEX = -100  # the target without a loss term; the default of torch's cross_entropy
_TOP_BIT = np.uint64(1 << 63)


class InjectedBatch(NamedTuple):
    """A batch with its meta-tokens in place."""

    input_ids: IntArray
    """(B, T), text and meta-tokens."""
    targets: IntArray
    """(B, T), what the output at each position must predict (already shifted); -100 where there is no loss term."""
    meta_positions: IntArray
    """(B, M), sorted indices of the meta-tokens in each row."""

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Loss terms of the batch."""
        return int(np.count_nonzero(self.targets != IGNORE_INDEX))

    @property
    def num_meta(self) -> int:
        """Meta-tokens of the batch."""
        return self.meta_positions.size

    @property
    def num_text(self) -> int:
        """Text tokens of the batch."""
        return self.input_ids.size - self.num_meta

    def to_model_inputs(self, rows: slice = slice(None), device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments for some rows: input_ids, shift_labels and, with M > 0, meta_indices."""
        import torch

        arrays = {"input_ids": self.input_ids[rows], "shift_labels": self.targets[rows]}
        if self.meta_positions.shape[1]:
            arrays["meta_indices"] = self.meta_positions[rows]
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def sample_meta_positions(
    injection: Injection,
    *,
    sample_ids: IntArray,
    block_size: int,
    seed: int,
    epoch: int | IntArray,
    text: TokenArray | None = None,
    ends_clause: BoolArray | None = None,
) -> IntArray:
    """Return the sorted positions of the meta-tokens of every row.

    - uniform: each subset of M positions has the same probability (but for ties among hashes of 64 - log2 T bits).
    - periodic: position j is floor((j + 1) T / M) - 1, so the last meta-token ends the block.
    - punctuation: right after text tokens that end a clause. M is fixed. If there are more than M clauses, a uniform
      subset of them gets a meta-token. If there are fewer, the remaining meta-tokens are placed uniformly; such a
      filler may stand after a clause's meta-token, but never between the clause and its meta-token.
    - thought: runs of length + 2, placed as single meta-tokens are under periodic or punctuation.
    - explicit: the given positions, in every row.
    - none: M = 0.

    Args:
        injection: The policy, a member of `metatokens.config.schema.Injection`.
        sample_ids: (B,) int64, the identity of each row's block; part of the key of its draws.
        block_size: T, text and meta-tokens together.
        seed: Part of the key.
        epoch: Part of the key, for all rows or (B,) int64.
        text: (B, >= N) text tokens of each row; where places follow punctuation only.
        ends_clause: (V,) bool, the text tokens after which a meta-token may stand; likewise.

    Returns:
        (B, M) int64, rows strictly rising, M = injection.num_meta(block_size).

    Raises:
        ValueError: Places follow punctuation and `text` or `ends_clause` is missing.
    """
    num_meta = injection.num_meta(block_size)
    num_rows = len(sample_ids)
    if num_meta == 0 or injection.kind == "none":
        return np.empty((num_rows, 0), dtype=np.int64)
    if injection.kind == "explicit":
        return np.tile(np.array(injection.positions, dtype=np.int64), (num_rows, 1))
    run = injection.num_tokens if injection.kind == "thought" else 1
    num_text, num_runs = block_size - num_meta, num_meta // run
    places = injection.after if injection.kind == "thought" else injection.kind
    if places in ("period", "periodic"):
        last = np.arange(1, num_runs + 1) * (num_text + num_runs) // num_runs - 1
        return _spread(np.tile(last, (num_rows, 1)), run)
    position_keys = hash_key(seed, epoch, sample_ids, Purpose.POSITIONS)
    if places == "uniform":
        return np.sort(_slots(_lowest_hashes(position_keys, block_size, num_meta), block_size), axis=1)
    if text is None or ends_clause is None:
        raise ValueError("injection at punctuation needs `text` and `ends_clause`, see `ends_clause_table`")
    clause_keys = hash_key(seed, epoch, sample_ids, Purpose.CLAUSES)
    return _spread(_after_clauses(ends_clause[text[:, :num_text]], num_runs, clause_keys, position_keys), run)


def _spread(positions: IntArray, run: int) -> IntArray:
    """Return the positions (B, M run) of runs that take the places of single meta-tokens (B, M)."""
    first = positions + np.arange(positions.shape[1]) * (run - 1)
    spread: IntArray = (first[..., None] + np.arange(run)).reshape(len(positions), -1)
    return spread


def inject_meta_tokens(
    text: TokenArray, meta_positions: IntArray, *, meta_token_id: int, loss_policy: LossPolicy
) -> InjectedBatch:
    """Put meta-tokens into rows of text and lay out the targets of the loss.

    A row of `text` holds N + 1 tokens: the block's N text tokens and the one that follows. The first token was the
    last target of the previous block, so it is not a target here. Under either policy, each other token is a target
    exactly once. With the text a b c d, the next token e, and meta-tokens _ at 0, 2 and 5:

        position                0  1  2  3  4  5  6
        input_ids               _  a  _  b  c  _  d
        targets, skip           .  .  b  c  .  d  e
        targets, retarget       .  b  .  c  d  .  e

    skip (the paper): each position predicts the token at the next position, and has no target if that is a
    meta-token. So a meta-token predicts the text token that follows it. The last position predicts the text token
    that follows the block, even if the block ends in a run of meta-tokens.
    retarget: each text token predicts the next text token; outputs at meta-tokens are unused.

    Args:
        text: (B, N + 1) text tokens, any integer type.
        meta_positions: (B, M) int64 positions in [0, N + M), strictly rising in each row.
        meta_token_id: The id to put there.
        loss_policy: Which position predicts which text token.

    Raises:
        UsageError: N = 0, so no position has a target.
        ValueError: A position lies outside the block, or occurs twice in a row of `meta_positions`.
    """
    num_rows, num_text = text.shape[0], text.shape[1] - 1
    num_meta = meta_positions.shape[1]
    block_size = num_text + num_meta
    if num_text < 1:
        raise UsageError(
            "injection",
            expected="at least one text token in a block",
            found=f"{num_meta} meta-tokens in {block_size} positions, no trainable target",
            remedy="lower injection.ratio",
        )
    is_text = np.ones((num_rows, block_size), dtype=np.bool_)
    if num_meta:
        if meta_positions.min(initial=0) < 0 or meta_positions.max(initial=0) >= block_size:
            raise ValueError(f"meta_positions must lie in [0, {block_size})")
        np.put_along_axis(is_text, meta_positions, False, axis=1)
        if np.count_nonzero(is_text) != num_rows * num_text:
            raise ValueError("meta_positions must not repeat in a row")
    input_ids = np.full((num_rows, block_size), meta_token_id, dtype=np.int64)
    input_ids[is_text] = text[:, :-1].ravel()
    targets = np.full((num_rows, block_size), IGNORE_INDEX, dtype=np.int64)
    targets[_has_target(is_text) if loss_policy == "skip" else is_text] = text[:, 1:].ravel()
    return InjectedBatch(input_ids, targets, meta_positions)


def inject_into_prompt(
    input_ids: Sequence[int],
    injection: Injection,
    *,
    meta_token_id: int,
    seed: int,
    ends_clause: BoolArray | None = None,
) -> list[int]:
    """Return one sequence of any length with meta-tokens inserted; all its text tokens stay.

    Warns if the prompt is too short to get a meta-token. The arguments are those of `sample_prompt_positions`, and
    `meta_token_id`, the id to insert.
    """
    meta_positions = sample_prompt_positions(input_ids, injection, seed=seed, ends_clause=ends_clause)
    if input_ids:
        warn_without_meta_tokens(injection, len(meta_positions), "a prompt")
    result = list(input_ids)
    for position in meta_positions:  # rising, so that every insertion lands at its final place
        result.insert(position, meta_token_id)
    return result


def sample_prompt_positions(
    input_ids: Sequence[int], injection: Injection, *, seed: int, ends_clause: BoolArray | None = None
) -> list[int]:
    """Return the ascending positions that the meta-tokens of one sequence have in the result.

    The ratio k counts text and meta-tokens together, as in a training block: M is the smallest solution of
    M = round(k (N + M)), found by iterating upwards from M = 0. Explicit positions beyond the text are left out.
    Except under the policy punctuation, two prompts with the same length and seed get the same layout.

    Args:
        input_ids: The N text tokens.
        injection: The policy.
        seed: The key of the draws.
        ends_clause: (V,) bool, needed by the policy punctuation.
    """
    num_text = len(input_ids)
    if num_text == 0:
        return []
    if injection.kind == "explicit":
        return [position for j, position in enumerate(injection.positions) if position <= num_text + j]
    num_meta = injection.num_meta(num_text)
    while (more := injection.num_meta(num_text + num_meta)) > num_meta:
        num_meta = more
    rows = sample_meta_positions(
        injection,
        sample_ids=np.zeros(1, dtype=np.int64),
        block_size=num_text + num_meta,
        seed=seed,
        epoch=0,
        text=np.array([input_ids], dtype=np.int64),
        ends_clause=ends_clause,
    )
    positions: list[int] = rows[0].tolist()
    return positions


def warn_without_meta_tokens(injection: Injection, num_meta: int, where: str) -> None:
    """Warn if a policy that should insert meta-tokens inserts none; Python shows the warning once per calling line."""
    if num_meta or injection.kind == "none":
        return
    if injection.kind == "explicit":
        wanted, remedy = bool(injection.positions), "lower injection.positions"
    else:
        wanted, remedy = injection.ratio > 0, "raise injection.ratio"
    if wanted:
        problem = f"injection.kind {injection.kind} puts no meta-token into {where}"
        warnings.warn(f"{problem}; lengthen the text or {remedy}", stacklevel=3)


def _lowest_hashes(keys: Uint64Array, num_slots: int, count: int, preferred: BoolArray | None = None) -> Uint64Array:
    """Return the `count` lowest of `num_slots` hashes per row, (B, count) uint64, each carrying its slot.

    The slot replaces the low bits of the hash. With `preferred` (B, num_slots) bool, the top bit is 0 for preferred
    slots and 1 for the others, so the others are taken only once the preferred ones run out. Rows are not sorted.
    """
    slots = np.arange(num_slots, dtype=np.uint64)
    packed = splitmix64(keys[:, None] + slots * GOLDEN_GAMMA)
    packed &= ~np.uint64(_slot_mask(num_slots))
    packed |= slots
    if preferred is not None:
        packed &= ~_TOP_BIT
        packed |= np.where(preferred, np.uint64(0), _TOP_BIT)
    if count < num_slots:
        packed.partition(count - 1, axis=1)
    return packed[:, :count]


def _slots(packed: Uint64Array, num_slots: int) -> IntArray:
    return (packed & np.uint64(_slot_mask(num_slots))).astype(np.int64)


def _slot_mask(num_slots: int) -> int:
    return (1 << (num_slots - 1).bit_length()) - 1


def _after_clauses(
    candidates: BoolArray, num_meta: int, clause_keys: Uint64Array, position_keys: Uint64Array
) -> IntArray:
    """Return (B, M) positions: after at most M of the candidates (B, N), the rest anywhere in the block.

    The text tokens and the meta-tokens of the chosen clauses form a row of items. The fillers are drawn from all T
    positions, and the items take the remaining positions in order.
    """
    num_rows, num_text = candidates.shape
    block_size = num_text + num_meta
    chosen = candidates.copy()
    crowded = np.flatnonzero(candidates.sum(axis=1) > num_meta)
    if len(crowded):
        lowest = _lowest_hashes(clause_keys[crowded], num_text, num_meta, preferred=candidates[crowded])
        chosen[crowded] = False
        chosen[crowded[:, None], _slots(lowest, num_text)] = True
    num_chosen = chosen.sum(axis=1)[:, None]

    # the item index of a clause's meta-token: text tokens up to it, plus meta-tokens of the clauses before it
    rows, texts = np.divmod(np.flatnonzero(chosen), num_text)
    is_meta_item = np.zeros((num_rows, block_size), dtype=np.bool_)
    is_meta_item[rows, texts + np.cumsum(chosen, axis=1)[rows, texts]] = True

    drawn = np.sort(_lowest_hashes(position_keys, block_size, num_meta), axis=1)
    is_drawn = np.arange(num_meta) < num_meta - num_chosen
    is_meta = np.zeros((num_rows, block_size), dtype=np.bool_)
    is_meta[np.nonzero(is_drawn)[0], _slots(drawn[is_drawn], block_size)] = True
    is_meta[~is_meta] = is_meta_item[np.arange(block_size) < num_text + num_chosen]
    positions: IntArray = (np.flatnonzero(is_meta) % block_size).reshape(num_rows, num_meta)
    return positions


def _has_target(is_text: BoolArray) -> BoolArray:
    """Return (B, T) bool: True at the positions that have a target under the policy skip."""
    has_target = np.empty_like(is_text)
    has_target[:, :-1] = is_text[:, 1:]
    has_target[:, -1] = True
    # a meta-token right before the first text token would predict it, but it was the previous block's last target
    first_text = is_text.argmax(axis=1)
    rows = np.flatnonzero(first_text)
    has_target[rows, first_text[rows] - 1] = False
    return has_target
