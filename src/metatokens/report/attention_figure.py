"""The attention in one text: the weights of every head, and a figure of what one token attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from metatokens.report import require_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES_PER_TOKEN, _LEAST_WIDTH, _MOST_WIDTH = 0.22, 4.0, 16.0
_MOST_LABELS = 80  # beyond them labels would run into one another
_INCHES_HIGH = 2.0


@dataclass(frozen=True, repr=False)
class Attention:
    """Who attends to whom in one text of T tokens; rows are queries, columns keys."""

    tokens: tuple[str, ...]
    """The text of each token."""
    is_meta: Tensor
    """(T,) bool, True at meta-tokens."""
    self_attention: Tensor
    """(L, H, T, T) weights, float32 or better; each row sums to 1."""
    meta_attention: Tensor
    """The same of meta-attention; 0 in layers without it and at tokens that take no part in it."""

    def __repr__(self) -> str:
        """Show the sizes."""
        layers, heads, tokens, _ = self.self_attention.shape
        return (
            f"Attention({tokens} tokens, {int(self.is_meta.sum())} of them meta-tokens, {layers} layers, {heads} heads)"
        )

    def plot(self, query: int = -1, *, layer: int | None = None, head: int | None = None) -> Figure:
        """Draw how one token attends to those before it, in both attentions.

        Args:
            query: Index of the token, counted from the end if negative.
            layer: Index of the layer; None means the mean over all that have the attention.
            head: Index of the head; None means the mean over all.

        Raises:
            UsageError: matplotlib is not installed.
            IndexError: There is no such token, layer or head.
        """
        num_layers, num_heads, num_tokens, _ = self.self_attention.shape
        for name, index, size in (
            ("token", query, num_tokens),
            ("layer", layer, num_layers),
            ("head", head, num_heads),
        ):
            if index is not None and not -size <= index < size:
                raise IndexError(f"there is no {name} {index}: the attention is of {size} {name}s")
        require_packages("a plot")
        query %= num_tokens
        branches = {
            name: self._weights_of(weights, query, layer, head)
            for name, weights in (("self-attention", self.self_attention), ("meta-attention", self.meta_attention))
            if weights[:, :, query].any()
        }
        where = ", ".join(
            f"mean over {part}s" if index is None else f"{part} {index}"
            for part, index in (("layer", layer), ("head", head))
        )
        return _draw(
            self.tokens[: query + 1],
            self.is_meta[: query + 1],
            branches,
            title=f"attention of token {query}, {self.tokens[query]!r}\n{where}",
        )

    def _weights_of(self, weights: Tensor, query: int, layer: int | None, head: int | None) -> Tensor:
        """Return the weights (query + 1,) of one query, averaged over the layers that have the attention."""
        layers = weights[weights.flatten(1).any(1)] if layer is None else weights[layer][None]
        heads = layers if head is None else layers[:, head, None]
        return heads[:, :, query, : query + 1].mean((0, 1))


def _draw(
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
    from matplotlib.figure import Figure

    from metatokens.report.palette import COLOURS

    num_tokens = len(tokens)
    width = min(_MOST_WIDTH, max(_LEAST_WIDTH, 1 + _INCHES_PER_TOKEN * num_tokens))
    figure = Figure(figsize=(width, 0.8 + _INCHES_HIGH * len(branches)), layout="constrained")
    panels = figure.subplots(len(branches), 1, sharex=True, squeeze=False).ravel()
    colours = [COLOURS[1] if meta else COLOURS[0] for meta in is_meta.tolist()]
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
