"""What the states of meta-tokens and the edges to them cause (E1 to E3, C2).

All three run on minimal pairs, and return one number a pair for every condition:

- `interchange` (E1) puts states of one prompt of a pair into the run of the other. Denoising, clean into corrupt, asks
  whether a state suffices for the answer; noising, corrupt into clean, whether it is needed.
  `patch_map` does it position by position in one pair.
- `block_paths` (E2) cuts edges. A model that caches the item in its meta-tokens survives the cut of the direct edges,
  and falls to chance only when those to the meta-tokens are cut with them: the interaction of the two.
- `knock_out_meta_attention` (E3) takes the second attention away, layer by layer.

Only meta-tokens behind the item matter here: the others are the same in both prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.causal.scores import FloatArray, PairBatch, Ratio, Scores, batches_of, join_scores, stack_pairs
from metatokens.errors import UsageError
from metatokens.lens import edits
from metatokens.model.loss import targets_of_labels

if TYPE_CHECKING:
    from metatokens.analysis.causal.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.edits import EdgeCut, Edit
    from metatokens.lens.lens import Lens

State = Literal["meta", "ordinary", "item", "last"]
Direction = Literal["denoise", "noise"]
Path = Literal["direct", "meta", "detour", "writing", "meta_branch"]

STATES: tuple[State, ...] = get_args(State)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
BATCH_SIZE = 16


# E1 ------------------------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """Which states of the residual stream are taken from the other prompt."""

    state: State
    """meta: the meta-tokens behind the item. Controls: ordinary, as many text tokens as near to them as can be
    (`matched_positions`); item, its own tokens; last, the token whose output is scored."""
    direction: Direction
    window: int
    """Sites patched together, around `site`; those that do not exist are left out."""
    site: int
    """0 what enters the first block, l what leaves block l - 1."""


@dataclass(frozen=True)
class Interchange:
    """Scores of the answer of the clean prompt, in every run."""

    clean: Scores
    corrupt: Scores
    """Below 0 where the model is right: this prompt's answer is the foil."""
    patched: dict[Patch, Scores]

    def effect(self, patch: Patch) -> Ratio:
        """Return which part of the way to the source's logit difference the patch goes (E1): 0 none, 1 all.

        For denoising that is the share of the answer restored, for noising the share of it destroyed.
        """
        of_clean, of_corrupt = self.clean.logit_difference, self.corrupt.logit_difference
        base, source = (of_corrupt, of_clean) if patch.direction == "denoise" else (of_clean, of_corrupt)
        return Ratio(self.patched[patch].logit_difference - base, source - base)


def interchange(
    lens: Lens,
    pairs: Sequence[MinimalPair],
    *,
    states: Sequence[State] = STATES,
    directions: Sequence[Direction] = DIRECTIONS,
    windows: Sequence[int] = (1, 3),
    batch_size: int = BATCH_SIZE,
) -> Interchange:
    """Patch states between the two prompts of each pair, at every site.

    Runs (sites) x (states) x (directions) x (windows) forward passes a batch, and holds the residual stream of two.

    Args:
        lens: around the model.
        pairs: minimal pairs in its tokens.
        states: which tokens' states.
        directions: denoise, clean into corrupt, or noise, the reverse.
        windows: numbers of neighbouring sites patched together, odd.
        batch_size: pairs of one forward pass.

    Raises:
        UsageError: see `batches_of`.
    """
    names = _site_names(lens)
    parts: list[dict[Patch | str, Scores]] = []
    for batch, rows in batches_of(lens, pairs, batch_size):
        with lens.capture(names) as of_clean:
            scores: dict[Patch | str, Scores] = {"clean": batch.score(lens, batch.clean)}
        with lens.capture(names) as of_corrupt:
            scores["corrupt"] = batch.score(lens, batch.corrupt)
        masks = _state_masks(batch, pairs[rows])
        for patch in _patches(states, directions, windows, len(names)):
            base, source = (batch.corrupt, of_clean) if patch.direction == "denoise" else (batch.clean, of_corrupt)
            reach = patch.window // 2
            nearby = names[max(0, patch.site - reach) : patch.site + reach + 1]
            with lens.edit(*(edits.replace(name, source[name], at=masks[patch.state]) for name in nearby)):
                scores[patch] = batch.score(lens, base)
        parts.append(scores)
    joined = join_scores(parts)
    patched = {key: value for key, value in joined.items() if isinstance(key, Patch)}
    return Interchange(joined["clean"], joined["corrupt"], patched)


def patch_map(lens: Lens, pair: MinimalPair, *, batch_size: int = BATCH_SIZE) -> FloatArray:
    """Patch the state of one position at one site from the clean run into the corrupt one, for each of them.

    It is E1, denoising by a window of 1, of a single position. Each row of a batch is the corrupt prompt with another
    position patched: (sites) x (positions from the item on) / (batch size) forward passes.

    Args:
        lens: around the model.
        pair: a minimal pair in its tokens.
        batch_size: positions of one forward pass.

    Returns:
        (L + 1, T), the share of the logit difference restored: 0 none, 1 all; site 0 is what enters the first block, l
        what leaves block l - 1. 0 before the item, where both runs are the same; NaN where both prompts score alike.
    """
    names = _site_names(lens)
    device, num_tokens = lens.model.device, len(pair.clean)
    both = stack_pairs([pair], device)
    with lens.capture(names) as of_clean:
        clean = float(both.score(lens, both.clean).logit_difference[0])
    corrupt = float(both.score(lens, both.corrupt).logit_difference[0])
    restored = np.zeros((len(names), num_tokens))
    if clean == corrupt:
        return np.full_like(restored, np.nan)
    for start in range(int(pair.item_positions[0]), num_tokens, batch_size):
        positions = np.arange(start, min(start + batch_size, num_tokens))
        batch = stack_pairs([pair] * len(positions), device)
        at = batch.mask(list(positions[:, None]))
        for site, name in enumerate(names):
            with lens.edit(edits.replace(name, of_clean[name], at=at)):
                scores = batch.score(lens, batch.corrupt)
            restored[site, positions] = (scores.logit_difference - corrupt) / (clean - corrupt)
    return restored


def matched_positions(pair: MinimalPair) -> IntArray:
    """Return as many ordinary positions as there are meta-tokens behind the item, each as near to one as can be.

    They are text tokens behind the item, and not the last token. Of two equally near, the earlier is taken: its prefix
    is the meta-token's own. A row with fewer text tokens than meta-tokens there has fewer.
    """
    columns = np.arange(pair.item_positions[-1] + 1, len(pair.clean) - 1)
    free = np.setdiff1d(columns, pair.meta_positions)
    taken = []
    for meta in pair.later_meta_positions[: len(free)]:
        nearest = int(free[np.abs(free - meta).argmin()])
        taken.append(nearest)
        free = free[free != nearest]
    return np.array(sorted(taken), dtype=np.int64)


def _site_names(lens: Lens) -> list[str]:
    """Return the taps of the L + 1 sites of a patch."""
    return ["embed.hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(len(lens.layout.blocks)))]


def _state_masks(batch: PairBatch, pairs: Sequence[MinimalPair]) -> dict[State, Tensor]:
    return {
        "meta": batch.is_later_meta,
        "ordinary": batch.mask([matched_positions(pair) for pair in pairs]),
        "item": batch.is_item,
        "last": batch.mask([np.array([len(pair.clean) - 1]) for pair in pairs]),
    }


def _patches(
    states: Sequence[State], directions: Sequence[Direction], windows: Sequence[int], num_sites: int
) -> Iterator[Patch]:
    for window in windows:
        if window < 1 or window % 2 == 0:
            raise UsageError("window of sites", expected="an odd number", found=str(window), remedy="give 1 or 3")
    for state in states:
        for direction in directions:
            for window in windows:
                for site in range(num_sites):
                    yield Patch(state, direction, window, site)


# E2 ------------------------------------------------------------------------------------------------------------

PATHS: dict[str, tuple[Path, ...]] = {
    "none": (),
    "direct": ("direct",),
    "meta": ("meta",),
    "direct+meta": ("direct", "meta"),
    "writing": ("writing",),
    "direct+writing": ("direct", "writing"),
    "meta branch": ("meta_branch",),
    "direct+meta branch": ("direct", "meta_branch"),
    "direct+meta+detour": ("direct", "meta", "detour"),
}
"""What is cut in each condition:

direct       what the question's text tokens read from the item
meta         what they read from the meta-tokens behind the item
detour       what they read from text tokens between the item and the question; with the two above, nothing of the item
             reaches the question, and the score is chance
writing      what the meta-tokens behind the item read from it
meta_branch  the output of meta-attention
"""


class Blocked(NamedTuple):
    """Paths cut from one layer on."""

    paths: str
    """A key of `PATHS`."""
    first_layer: int


@dataclass(frozen=True)
class PathBlocking:
    """Scores of both prompts of each pair, each towards its own answer, and their mean: 0 logits is chance."""

    scores: dict[Blocked, Scores]

    def kept(self, paths: str, first_layer: int) -> Ratio:
        """Return the share of the logit difference that is left with some paths cut."""
        return Ratio(self._difference(paths, first_layer), self._difference("none", first_layer))

    def interaction(self, first_layer: int) -> FloatArray:
        """Return by how much more a cut of the meta path costs once the direct path is cut, in logits, (pairs,).

        (direct - both) - (none - meta): 0 where one path does it all, and where the two add up; positive where either
        would do, which is implicit caching.
        """
        direct, both, none, meta = (
            self._difference(paths, first_layer) for paths in ("direct", "direct+meta", "none", "meta")
        )
        return (direct - both) - (none - meta)

    def _difference(self, paths: str, first_layer: int) -> FloatArray:
        return self.scores[Blocked(paths, first_layer)].logit_difference


def block_paths(
    lens: Lens,
    pairs: Sequence[MinimalPair],
    *,
    paths: Sequence[str] | None = None,
    first_layers: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> PathBlocking:
    """Cut the paths from the item to the answer, alone and together, from each layer on.

    Args:
        lens: around the model.
        pairs: minimal pairs in its tokens.
        paths: keys of `PATHS`; by default all that the model has.
        first_layers: cut in these layers and all above; by default each.
        batch_size: pairs of one forward pass.

    Raises:
        UsageError: An unknown key, meta-attention cut in a model without, or see `batches_of`.
    """
    num_layers = len(lens.layout.blocks)
    has_branch = bool(_meta_layers(lens))
    if paths is None:
        paths = [name for name, cuts in PATHS.items() if has_branch or "meta_branch" not in cuts]
    for name in paths:
        if name not in PATHS or ("meta_branch" in PATHS[name] and not has_branch):
            raise UsageError(
                "paths to cut",
                expected=f"some of {', '.join(PATHS)}{'' if has_branch else ', no meta branch in this model'}",
                found=repr(name),
                remedy="name others",
            )
    blocked = [Blocked(name, first) for first in first_layers or range(num_layers) for name in paths]
    parts = []
    for batch, _ in batches_of(lens, pairs, batch_size):
        scores = {}
        for key in blocked:
            layers = range(key.first_layer, num_layers)
            with lens.edit(*(edit for path in PATHS[key.paths] for edit in _cut(lens, batch, path, layers))):
                scores[key] = batch.score_both(lens)
        parts.append(scores)
    return PathBlocking(join_scores(parts))


def _cut(lens: Lens, batch: PairBatch, path: Path, layers: Sequence[int]) -> list[Edit | EdgeCut]:
    if path == "meta_branch":
        return [edits.scale(f"blocks.{layer}.hook_meta_out", 0.0) for layer in _meta_layers(lens) if layer in layers]
    query, key = {
        "direct": (batch.is_question, batch.is_item),
        "meta": (batch.is_question, batch.is_later_meta),
        "detour": (batch.is_question, batch.is_between),
        "writing": (batch.is_later_meta, batch.is_item),
    }[path]
    return [edits.cut_edges(layers, query=query, key=key)]


# E3 ------------------------------------------------------------------------------------------------------------


class KnockOut(NamedTuple):
    """What meta-attention loses."""

    kind: Literal["zero", "mean", "older"]
    """zero: its output. mean: all of its output but the mean over the meta-tokens of all prompts. older: what a
    meta-token reads from more than `num_kept` meta-tokens back."""
    layers: tuple[int, ...]
    num_kept: int | None = None


@dataclass(frozen=True)
class KnockOuts:
    """Scores of both prompts of each pair, each towards its own answer, and their mean."""

    full: Scores
    knocked_out: dict[KnockOut, Scores]

    def loss(self, knock_out: KnockOut) -> FloatArray:
        """Return the rise of the answer's cross-entropy (C2), nats a pair, (pairs,)."""
        return self.knocked_out[knock_out].cross_entropy - self.full.cross_entropy


def list_knock_outs(lens: Lens, *, num_kept: Sequence[int] = (1, 4)) -> list[KnockOut]:
    """Return every kind for each layer with meta-attention alone, and for all of them together."""
    layers = _meta_layers(lens)
    sets = [(layer,) for layer in layers] + ([tuple(layers)] if len(layers) > 1 else [])
    return [
        knock_out
        for chosen in sets
        for knock_out in (
            KnockOut("zero", chosen),
            KnockOut("mean", chosen),
            *(KnockOut("older", chosen, number) for number in num_kept),
        )
    ]


def knock_out_meta_attention(
    lens: Lens,
    pairs: Sequence[MinimalPair],
    *,
    knock_outs: Sequence[KnockOut] | None = None,
    batch_size: int = BATCH_SIZE,
) -> KnockOuts:
    """Take meta-attention away from a trained model, in the layers and in the way that each knock-out says.

    Args:
        lens: around the model.
        pairs: minimal pairs in its tokens; their meta-tokens give the means.
        knock_outs: by default those of `list_knock_outs`.
        batch_size: pairs of one forward pass.

    Raises:
        UsageError: A model without meta-attention among meta-tokens, or see `batches_of`.
    """
    knock_outs = _check_knock_outs(lens, knock_outs)
    means: dict[int, Tensor] = {}
    if any(knock_out.kind == "mean" for knock_out in knock_outs):
        batches = (batch for batch, _ in batches_of(lens, pairs, batch_size))
        means = _mean_outputs(lens, ((ids, b.is_meta) for b in batches for ids in (b.clean, b.corrupt)))
    parts: list[dict[KnockOut | None, Scores]] = []
    for batch, _ in batches_of(lens, pairs, batch_size):
        scores: dict[KnockOut | None, Scores] = {None: batch.score_both(lens)}
        for knock_out in knock_outs:
            with lens.edit(*_knock_out_edits(knock_out, batch.is_meta, means)):
                scores[knock_out] = batch.score_both(lens)
        parts.append(scores)
    joined = join_scores(parts)
    return KnockOuts(joined.pop(None), {key: value for key, value in joined.items() if key is not None})


@dataclass(frozen=True)
class TextKnockOuts:
    """Loss of documents; arrays of shape (documents,)."""

    full: FloatArray
    """Nats per text token."""
    rises: dict[KnockOut, FloatArray]
    """Nats per text token more than `full` (C2)."""


def knock_out_on_text(
    lens: Lens, documents: Sequence[IntArray], *, knock_outs: Sequence[KnockOut] | None = None
) -> TextKnockOuts:
    """Return what each knock-out costs on documents (T,), text and meta-tokens; those give the means.

    Raises:
        UsageError: A model without meta-attention among meta-tokens, or means without a meta-token.
    """
    knock_outs = _check_knock_outs(lens, knock_outs)
    config = lens.model.config
    rows = [torch.from_numpy(np.asarray(document)[None]).to(lens.model.device) for document in documents]
    prompts = [(ids, ids == config.meta_token_id) for ids in rows]
    means = _mean_outputs(lens, prompts) if any(knock_out.kind == "mean" for knock_out in knock_outs) else {}
    losses: dict[KnockOut | None, list[float]] = {key: [] for key in (None, *knock_outs)}
    for ids, is_meta in prompts:
        targets = targets_of_labels(ids, is_meta, config.loss_policy)
        for key, values in losses.items():
            with lens.edit(*([] if key is None else _knock_out_edits(key, is_meta, means))):
                values.append(float(lens(ids, shift_labels=targets, use_cache=False, logits_to_keep=1).loss))
    full = np.array(losses.pop(None))
    return TextKnockOuts(full, {key: np.array(values) - full for key, values in losses.items() if key is not None})


def _check_knock_outs(lens: Lens, knock_outs: Sequence[KnockOut] | None) -> Sequence[KnockOut]:
    if not _meta_layers(lens) or lens.model.config.meta_attention_over != "meta":
        raise UsageError(
            "knock-out of meta-attention",
            expected="a model with meta-attention over its meta-tokens",
            found="one without",
            remedy="leave it out",
        )
    return list_knock_outs(lens) if knock_outs is None else knock_outs


def _knock_out_edits(knock_out: KnockOut, is_meta: Tensor, means: dict[int, Tensor]) -> list[Edit | EdgeCut]:
    if knock_out.kind == "older":
        assert knock_out.num_kept is not None, "older needs the number of meta-tokens that stay in sight"
        return [edits.cut_older_edges(knock_out.layers, is_meta=is_meta, num_kept=knock_out.num_kept)]
    if knock_out.kind == "zero":
        return [edits.scale(f"blocks.{layer}.hook_meta_out", 0.0) for layer in knock_out.layers]
    return [edits.replace(f"blocks.{layer}.hook_meta_out", means[layer], at=is_meta) for layer in knock_out.layers]


def _mean_outputs(lens: Lens, prompts: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Return the mean output (C,) of meta-attention over the meta-tokens of prompts (ids, is_meta), by layer."""
    sums: dict[int, Tensor] = {}
    count = 0
    for ids, is_meta in prompts:
        if not is_meta.any():
            continue
        with lens.capture(["blocks.*.hook_meta_out"], at=is_meta, dtype=torch.float64) as captured:
            lens(ids, use_cache=False, logits_to_keep=1)
        for layer in _meta_layers(lens):
            total = captured[f"blocks.{layer}.hook_meta_out"].sum(0)
            sums[layer] = sums[layer] + total if layer in sums else total
        count += int(is_meta.sum())
    if not count:
        raise UsageError(
            "mean output of meta-attention",
            expected="some meta-token",
            found="none",
            remedy="inject meta-tokens, or leave the kind mean out",
        )
    return {layer: total / count for layer, total in sums.items()}


def _meta_layers(lens: Lens) -> list[int]:
    return [site.layer for block in lens.layout.blocks for site in block.attentions if site.branch == "meta_attn"]
