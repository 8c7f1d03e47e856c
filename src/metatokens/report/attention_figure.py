"""How one token attends to those before it, in both attentions, as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch import Tensor

from metatokens.report.figures import COLOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

_TEXT_COLOUR, _META_COLOUR = COLOURS[0], COLOURS[1]
_INCHES_PER_TOKEN, _LEAST_WIDTH, _MOST_WIDTH = 0.22, 4.0, 16.0
_MOST_LABELS = 80  # beyond them labels would run into one another
_INCHES_HIGH = 2.0


def draw_attention(
    tokens: Sequence[str],
    is_meta: Tensor,
    branches: dict[str, Tensor],
    *,
    title: str,
) -> Figure:
    """Draw the weights of one query, one panel for each attention and one bar for each key.

    Args:
        tokens: The text of each key, (K,).
        is_meta: (K,) bool.
        branches: The weights (K,) by the name of the attention.
        title: What the query is.
    """
    num_tokens = len(tokens)
    width = min(_MOST_WIDTH, max(_LEAST_WIDTH, 1 + _INCHES_PER_TOKEN * num_tokens))
    figure = Figure(figsize=(width, 0.8 + _INCHES_HIGH * len(branches)), layout="constrained")
    panels = figure.subplots(len(branches), 1, sharex=True, squeeze=False).ravel()
    colours = [_META_COLOUR if meta else _TEXT_COLOUR for meta in is_meta.tolist()]
    for axes, (name, weights) in zip(panels, branches.items(), strict=True):
        axes.bar(range(num_tokens), weights.tolist(), color=colours, width=0.8)
        axes.set(ylabel=f"{name} weight", ylim=(0, max(1e-9, 1.1 * float(weights.max()))))
        axes.spines[["top", "right"]].set_visible(False)
    labels = [_visible(token) for token in tokens] if num_tokens <= _MOST_LABELS else None
    if labels is None:
        panels[-1].set_xlabel("token")
    else:
        panels[-1].set_xticks(range(num_tokens), labels, rotation=90, fontsize=8, fontfamily="monospace")
        for label, colour in zip(panels[-1].get_xticklabels(), colours, strict=True):
            label.set_color(colour)
    figure.suptitle(title, fontsize=10)
    return figure


def _visible(token: str) -> str:
    """Return a token with its spaces and line ends as signs, and without what matplotlib takes for mathematics."""
    return token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5").replace("$", r"\$")
