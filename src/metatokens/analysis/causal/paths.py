"""Paths from the item to the answer, cut alone and together.

A model that caches the item in its meta-tokens survives the cut of the direct edges, and falls to chance only when
those to the meta-tokens are cut with them: the interaction of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import BATCH_SIZE, FloatArray, PairBatch, Scores, batches_of, join_scores
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.lens import edits

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.lens.edits import EdgeCut, Edit
    from metatokens.lens.lens import Lens

Path = Literal["direct", "meta", "detour", "meta_branch"]

PATHS: dict[str, tuple[Path, ...]] = {
    "full": (),
    "direct cut": ("direct",),
    "meta cut": ("meta",),
    "both cut": ("direct", "meta"),
    "meta-attention off": ("meta_branch",),
    "direct cut, meta-attention off": ("direct", "meta_branch"),
    "all paths cut": ("direct", "meta", "detour"),
}
"""The paths cut in each condition, in all layers:

direct       what the question's text tokens read from the item
meta         what they read from the meta-tokens behind the item
detour       what they read from text tokens between the item and the question; with the two above, nothing of the item
             reaches the question, and the score is chance
meta_branch  the output of meta-attention
"""


def block_paths(lens: Lens, pairs: Sequence[MinimalPair], *, batch_size: int = BATCH_SIZE) -> dict[str, Scores]:
    """Cut the paths from the item to the answer, alone and together.

    Args:
        lens: On the model.
        pairs: Minimal pairs in its tokens.
        batch_size: Pairs of one forward pass.

    Returns:
        The scores of each condition of `PATHS` that the model allows: the mean over both prompts of a pair, each
        towards its own answer, so that 0 logits is chance.

    Raises:
        ValueError: See `batches_of`.
    """
    conditions = {name: paths for name, paths in PATHS.items() if lens.layout.meta_layers or "meta_branch" not in paths}

    def score(batch: PairBatch) -> Iterator[tuple[str, Scores]]:
        for name, paths in conditions.items():
            with lens.edit(*(edit for path in paths for edit in _cut(batch, path))):
                yield name, batch.score_both(lens)

    return join_scores(dict(score(batch)) for batch in batches_of(lens, pairs, batch_size))


def _cut(batch: PairBatch, path: Path) -> list[Edit | EdgeCut]:
    if path == "meta_branch":
        return [edits.scale("blocks.*.hook_meta_out", 0.0)]
    read = {"direct": batch.is_item, "meta": batch.is_later_meta, "detour": batch.is_between}[path]
    return [edits.cut_edges(None, query=batch.is_question, key=read)]


def interaction_of(scores: Mapping[str, Scores]) -> FloatArray:
    """Return (direct cut - both cut) - (full - meta cut), in logits, (pairs,).

    It is 0 where one path does it all and where the two add up, and positive where either would do: implicit caching.
    """
    direct, both, full, meta = (
        scores[condition].logit_difference for condition in ("direct cut", "both cut", "full", "meta cut")
    )
    return (direct - both) - (full - meta)


@shared
def blocking_of(inputs: Inputs) -> dict[str, Scores]:
    """Return the scores with paths cut."""
    return block_paths(inputs.lens, pairs_of(inputs))


@measure(
    "causal",
    "logits",
    axes=("condition",),
    subject="task",
    plot=Dots("condition"),
    positive="the model prefers the answer",
)
def logit_difference(inputs: Inputs) -> Rows:
    """Logit of the answer minus the foil's with paths cut in all layers, mean over both prompts of a pair."""
    for condition, scores in blocking_of(inputs).items():
        yield Row({"condition": condition}, scores.logit_difference)


@measure("causal", "1", axes=("condition",), statistic="accuracy", subject="task")
def pair_accuracy(inputs: Inputs) -> Rows:
    """Share of the prompts of pairs whose answer is the most likely text token, with paths cut."""
    for condition, scores in blocking_of(inputs).items():
        yield Row({"condition": condition}, scores.accuracy)


@measure("causal", "logits", test=True, subject="task", positive="either path alone would do")
def interaction(inputs: Inputs) -> Rows:
    """By how much more a cut of the meta path costs once the direct path is cut; 0 where one path does it all."""
    yield Row({}, interaction_of(blocking_of(inputs)))


@measure("causal", "logits", test=True, subject="task", positive="meta-tokens carry the answer")
def meta_path(inputs: Inputs) -> Rows:
    """What the meta path carries once the direct path is cut: logit difference, direct cut minus both cut."""
    scores = blocking_of(inputs)
    yield Row({}, scores["direct cut"].logit_difference - scores["both cut"].logit_difference)
