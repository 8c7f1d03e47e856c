"""Paths from the item to the answer, cut alone and together.

A model that caches the item in its meta-tokens survives the cut of the direct edges, and falls to chance only when
those to the meta-tokens are cut with them: the interaction of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import FloatArray, PairBatch, Ratio, Scores, batches_of, join_scores, meta_layers
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.lens import edits

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.lens.edits import EdgeCut, Edit
    from metatokens.lens.lens import Lens

Path = Literal["direct", "meta", "detour", "meta_branch"]

BATCH_SIZE = 16
_CONDITIONS = {
    "none": "full",
    "direct": "direct cut",
    "meta": "meta cut",
    "direct+meta": "both cut",
    "meta branch": "meta-attention off",
    "direct+meta branch": "direct cut, meta-attention off",
    "direct+meta+detour": "all paths cut",
}


PATHS: dict[str, tuple[Path, ...]] = {
    "none": (),
    "direct": ("direct",),
    "meta": ("meta",),
    "direct+meta": ("direct", "meta"),
    "meta branch": ("meta_branch",),
    "direct+meta branch": ("direct", "meta_branch"),
    "direct+meta+detour": ("direct", "meta", "detour"),
}
"""What is cut in each condition:

direct       what the question's text tokens read from the item
meta         what they read from the meta-tokens behind the item
detour       what they read from text tokens between the item and the question; with the two above, nothing of the item
             reaches the question, and the score is chance
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
    has_branch = bool(meta_layers(lens))
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
        return [edits.scale(f"blocks.{layer}.hook_meta_out", 0.0) for layer in meta_layers(lens) if layer in layers]
    query, key = {
        "direct": (batch.is_question, batch.is_item),
        "meta": (batch.is_question, batch.is_later_meta),
        "detour": (batch.is_question, batch.is_between),
    }[path]
    return [edits.cut_edges(layers, query=query, key=key)]


@shared
def blocking_of(inputs: Inputs) -> PathBlocking:
    """Return the scores with paths cut in all layers."""
    return block_paths(inputs.lens, pairs_of(inputs), first_layers=[0])


@measure("causal", "logits", axes=("condition",), subject="task", plot=Dots("condition"))
def logit_difference(inputs: Inputs) -> Rows:
    """Logit of the answer minus the foil's with paths cut in all layers, mean over both prompts of a pair."""
    for blocked, scores in blocking_of(inputs).scores.items():
        yield Row({"condition": _CONDITIONS[blocked.paths]}, scores.logit_difference)


@measure("causal", "1", axes=("condition",), statistic="accuracy", subject="task")
def pair_accuracy(inputs: Inputs) -> Rows:
    """Share of the prompts of pairs whose answer is the most likely text token, with paths cut."""
    for blocked, scores in blocking_of(inputs).scores.items():
        yield Row({"condition": _CONDITIONS[blocked.paths]}, scores.accuracy)


@measure("causal", "logits", test=True, subject="task")
def interaction(inputs: Inputs) -> Rows:
    """By how much more a cut of the meta path costs once the direct path is cut; 0 where one path does it all."""
    yield Row({}, blocking_of(inputs).interaction(0))


@measure("causal", "logits", test=True, subject="task")
def meta_path(inputs: Inputs) -> Rows:
    """What the meta path carries once the direct path is cut: logit difference, direct cut minus both cut."""
    scores = blocking_of(inputs).scores
    direct, both = (scores[Blocked(name, 0)].logit_difference for name in ("direct", "direct+meta"))
    yield Row({}, direct - both)
