"""The sharpening theorem, stated so that it is true, and its audit on real models; docs/theory.md has the proofs.

The paper (Theorem 4.1) says that a boost of one key's logit lowers the entropy of its attention row. It does so only
where that key already has its share. For one key of a row: p its weight, H_q the entropy of the other weights alone,
N = e^{H_q} the effective number of competitors, and

    x = l - E_q[l']      the margin of its logit over the mean logit of the others, weighted as they are,

the entropy is a function of x and N alone, whatever the logits:

    H(x) = ln(e^x + N) - x e^x / (e^x + N),      dH/dx = -p (1 - p) x.

So a boost lowers H from the start if x >= 0; if x < 0, H first rises, up to ln(1 + N) at x = 0, and is lower than
before only once the boost exceeds a critical one between |x| and 2 |x|. Functions of margins work on tensors of any
shape, float64 for exactness; entropies are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metatokens.analysis.attention.rows import binary_entropy, softmax_over

BISECTIONS = 60
"""Halvings of the bracket of the critical boost: to the last bit of float64."""


def margin_entropy(margin: Tensor, competitors: Tensor) -> Tensor:
    """Return H(x) of a row by one key's margin x and the effective number N >= 1 of its competitors."""
    log_competitors = competitors.log()
    log_norm = torch.logaddexp(margin, log_competitors)
    return log_norm - margin * (margin - log_norm).exp()


def critical_boost(margin: Tensor, competitors: Tensor) -> Tensor:
    """Return the boost beyond which the entropy is lower than without one: 0 where x >= 0, else in (|x|, 2 |x|].

    It has no closed form; bisection between the bounds of the theorem.
    """
    low, high = margin.abs(), 2 * margin.abs()
    start = margin_entropy(margin, competitors)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_lower = margin_entropy(margin + middle, competitors) < start
        low, high = torch.where(is_lower, low, middle), torch.where(is_lower, middle, high)
    return torch.where(margin >= 0, 0.0, high)


@dataclass(frozen=True)
class KeyBoosts:
    """Margins and boosts of the meta keys of rows, between two runs; (B, H, Q, M) each, NaN where unknown."""

    margin: Tensor
    """x in the ablated run."""
    competitors: Tensor
    """N in the ablated run."""
    boost: Tensor
    """D."""

    @property
    def is_known(self) -> Tensor:
        """True at keys that the query sees and that leave some weight to others."""
        return self.margin.isfinite() & self.boost.isfinite()

    @property
    def is_beyond(self) -> Tensor:
        """True at boosts beyond the critical one: the boost alone lowers H, which shows without that number."""
        before = margin_entropy(self.margin, self.competitors)
        is_lower = margin_entropy(self.margin + self.boost, self.competitors) < before
        return (self.boost > 0) & ((self.margin >= 0) | is_lower)


class RowAudit(NamedTuple):
    """Rows of one attention with the meta-tokens' embedding and without; entropies in nats, (B, H, Q) each."""

    entropy_without: Tensor
    """H of the ablated run."""
    entropy_with: Tensor
    mechanism: Tensor
    """What the changed logits of the meta keys alone do to H, averaged over changing them first and last."""
    boosts: KeyBoosts
    """Of each edge to a meta key."""


class _RowSums(NamedTuple):
    """Of rows, or of one set of their keys; (B, H, Q) float64 each."""

    log_norm: Tensor
    """Logarithm of the sum of e^score."""
    entropy: Tensor
    """Of the softmax over these keys alone, nats."""


def _key_boosts(before: Tensor, after: Tensor, *, visible: Tensor, keys: Tensor, ablated: _RowSums) -> KeyBoosts:
    """Return the margin of some keys in the ablated run, and their boosts.

    The boost is the rise of a key's score minus the mean rise of its competitors, weighted as in the ablated run:
    a common shift of all scores changes no weight. NaN where a key has all the weight to within rounding, so that
    nothing is known of the others.

    Args:
        before: (B, H, Q, K) float64 scores of the ablated run.
        after: (B, H, Q, K) float64 scores of the full run.
        visible: (B, H, Q, K) bool.
        keys: (B, M) int64, indices of the keys to look at; -1 for none.
        ablated: The rows of the ablated run.
    """
    log_norm, entropy = ablated.log_norm[..., None], ablated.entropy[..., None]
    weights = torch.where(visible, before, -torch.inf).sub_(log_norm).exp_()
    mean_before = log_norm - entropy  # H = ln Z - E[s]
    mean_after = weights.mul_(torch.where(visible, after, 0)).sum(-1, keepdim=True)

    index = keys.clamp(min=0)[:, None, None, :].expand(*before.shape[:3], -1)
    before, after, sees = before.gather(-1, index), after.gather(-1, index), visible.gather(-1, index)
    share = (before - log_norm).exp()
    rest = 1 - share
    others_mean = (mean_before - share * before) / rest
    others_entropy = ((entropy - binary_entropy(share, rest)) / rest).clamp(min=0)
    others_rise = (mean_after - mean_before - share * (after - before)) / rest
    is_known = sees & (keys >= 0)[:, None, None, :] & (rest > torch.finfo(rest.dtype).eps ** 0.5)
    found = (before - others_mean, others_entropy.exp(), after - before - others_rise)
    return KeyBoosts(*(torch.where(is_known, values, torch.nan) for values in found))


def audit_rows(scores_without: Tensor, scores_with: Tensor, *, visible: Tensor, is_meta: Tensor) -> RowAudit:
    """Hold the theorem against attention rows of two runs.

    The mechanism is the change of H when the scores of the meta keys alone go from one run to the other, with those of
    all other keys as in the first run or as in the second, averaged.

    Args:
        scores_without: (B, H, Q, K) scores of the ablated run.
        scores_with: (B, H, Q, K) scores of the full run.
        visible: (B, 1, Q, K) bool, or fewer dimensions to broadcast.
        is_meta: (B, K) bool, True at meta keys.
    """
    before, after = scores_without.double(), scores_with.double()
    visible = visible.expand(before.shape)
    of_meta = is_meta.any(0)  # few columns, which alone are looked at
    meta, text = visible & is_meta[:, None, None, :], visible & ~is_meta[:, None, None, :]
    meta_before, meta_after = (_sums(scores[..., of_meta], meta[..., of_meta]) for scores in (before, after))
    text_before, text_after = (_sums(scores, text) for scores in (before, after))
    without, with_all = _join(meta_before, text_before), _join(meta_after, text_after)
    meta_first, meta_last = _join(meta_after, text_before), _join(meta_before, text_after)
    return RowAudit(
        without.entropy,
        with_all.entropy,
        ((meta_first.entropy - without.entropy) + (with_all.entropy - meta_last.entropy)) / 2,
        _key_boosts(before, after, visible=visible, keys=_indices_of(is_meta), ablated=without),
    )


def _indices_of(members: Tensor) -> Tensor:
    """Return (B, M) int64, the indices of the members of each row in order, filled up with -1."""
    most = int(members.sum(-1).max())
    order = torch.argsort(~members, dim=-1, stable=True)[:, :most]
    return torch.where(members.gather(1, order), order, -1)


def _sums(scores: Tensor, keys: Tensor) -> _RowSums:
    log_norm, entropy, _ = softmax_over(scores, keys)
    return _RowSums(log_norm, entropy)


def _join(first: _RowSums, second: _RowSums) -> _RowSums:
    """Return the sums over two sets of keys that have none in common, by the chain rule of entropy."""
    log_odds = first.log_norm - second.log_norm
    share, rest = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    # a set without keys has no entropy, and no weight; a row without any has NaN for its share
    within = (torch.where(part == 0, 0, part * one.entropy) for part, one in ((share, first), (rest, second)))
    return _RowSums(torch.logaddexp(first.log_norm, second.log_norm), binary_entropy(share, rest) + sum(within))
