"""Windows of documents: which tokens are scored, with which context, and how meta-tokens take part.

Every document is scored on its own, with an end of text (#) before its tokens. A window of L text tokens has L inputs
and the L targets that they predict, so its input begins with the token before its first target. With the document
a b c d e f g, L = 4 and S = 2 (an earlier window has scored the targets in brackets):

    windows              number   input      targets
    non-overlapping         0     # a b c     a  b  c  d
                            1     d e f       e  f  g
    sliding by S            0     # a b c     a  b  c  d
                            1     b c d e    [c][d] e  f
                            2     d e f      [e][f] g

Observe that both kinds score every text token exactly once, including the first, from the end of text alone, and those
of the last, partial window. The end of text is never a target.
Observe that non-overlapping windows score token j of a window (counted from 0) from the j tokens before it in the
window and the one before the window. So their mean includes short contexts; the buckets separate them. Sliding windows
after the first give every token at least L - S tokens of context.

Meta-tokens are inserted into the input of each window, keyed by (seed, epoch = document number, sample = window
number). They are never targets. The model's loss policy decides which output predicts a text token. `window_unit`
"text" gives every injection the same text windows, with the M meta-tokens on top; "positions" gives every injection the
same number of positions. A partial window keeps the ratio. Under the policy punctuation the layout depends on all the
text of its window, later text included, so its perplexity is not strictly causal; the other layouts ignore the text.

The windows are those of Landmark Attention (non-overlapping, but it drops the partial one) and YaRN (sliding by 256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from metatokens.config.schema import ExplicitInjection, Frozen, Injection, NoInjection
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import Intervention

WindowUnit = Literal["text", "positions"]


class PerplexityOptions(Frozen):
    """How documents are cut into windows, and which meta-tokens and interventions are applied."""

    window: int | None = Field(None, ge=1)
    """L: length of a window, in `window_unit`; off means all positions of the model."""
    window_unit: WindowUnit = "text"
    """text: L text tokens and the meta-tokens on top; positions: L positions, meta-tokens among them."""
    stride: int | None = Field(None, ge=1)
    """S: text tokens that the sliding windows move by; by default 256, or half a window's text tokens if that is less,
    so that windows overlap. With S = a window's text tokens, both kinds of windows are the same and scored once."""
    extrapolate: bool = False
    """Allow windows longer than the model's, if its positions have no end (all but learned ones, positions drawn from a
    range and dynamic scaling of rope)."""
    injection: Injection = NoInjection()
    """Meta-tokens of a window."""
    interventions: tuple[Intervention, ...] = ()
    """Changes to the model at the meta-tokens; `mean_embedding` is the mean over the scored tokens."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the injection and of the bootstrap."""
    max_tokens_per_document: int | None = Field(None, ge=1)
    """How many text tokens of every document to score, from its start; off means all."""
    batch_size: int = Field(8, ge=1)
    """Windows per forward pass."""


@dataclass(frozen=True)
class Window:
    """A stretch of one document."""

    number: int
    """Its number in the document, from 0; part of the key of its injection."""
    start: int
    """Text tokens of the document before its first target."""
    num_text: int
    """Number of its targets, and of its text inputs."""
    num_scored: int
    """Number of targets scored, counted from the end."""


def lay_windows(num_tokens: int, *, window: int, stride: int) -> list[Window]:
    """Return the windows of a document of `num_tokens` text tokens; with `stride` = `window` they do not overlap.

    Window number w begins before token w * stride; the last one ends with the document and may be shorter.

    Args:
        num_tokens: Text tokens of the document, at least 1.
        window: Text tokens of a window.
        stride: Text tokens between the starts of windows, at most `window`.
    """
    windows = []
    scored = 0
    for number in range(1 + -(-max(0, num_tokens - window) // stride)):
        start = number * stride
        end = min(start + window, num_tokens)
        windows.append(Window(number, start, end - start, end - scored))
        scored = end
    return windows


def with_window(options: PerplexityOptions, limit: int | None) -> PerplexityOptions:
    """Return the options with the window of a model of at most `limit` positions, if they name none."""
    if options.window is not None:
        return options
    if limit is None:
        raise UsageError(
            "window", expected="a length, as the model states none", found="nothing", remedy="name a window, as 1024"
        )
    return options.model_copy(update={"window": limit, "window_unit": "positions"})


def full_window(options: PerplexityOptions) -> tuple[int, int]:
    """Return the text tokens and the positions of a full window."""
    assert options.window is not None
    if options.window_unit == "text":
        return options.window, fit_injection(options.injection, options.window)[1]
    injection = options.injection
    if injection.kind == "explicit":
        num_meta = sum(position < options.window for position in injection.positions)
    else:
        num_meta = injection.num_meta(options.window)
    if num_meta >= options.window:
        raise UsageError(
            f"window of {options.window} positions",
            expected="at least one text token",
            found=f"{num_meta} meta-tokens",
            remedy="lower injection.ratio or take a longer window",
        )
    return options.window - num_meta, options.window


def fit_injection(injection: Injection, num_text: int, block_size: int | None = None) -> tuple[Injection, int]:
    """Return the injection for a block with `num_text` text tokens, and the block's positions.

    Without a `block_size` the ratio k counts text and meta-tokens together, as in `inject_into_prompt`: M is the
    smallest solution of M = round(k (N + M)). Explicit positions beyond the text are left out.
    """
    if injection.kind == "explicit":
        reached = tuple(position for j, position in enumerate(injection.positions) if position <= num_text + j)
        return ExplicitInjection(positions=reached), num_text + len(reached)
    if block_size is not None:
        return injection, block_size
    num_meta = 0
    while (more := injection.num_meta(num_text + num_meta)) > num_meta:
        num_meta = more
    return injection, num_text + num_meta
