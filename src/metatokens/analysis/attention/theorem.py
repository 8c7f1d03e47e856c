"""The sharpening theorem, stated so that it is true, and its audit on real models; docs/theory.md has the proofs.

The paper (Theorem 4.1) says that a boost of one key's logit lowers the entropy of its attention row. It does so only
where that key already has its share. For one key of a row: p its weight, H_q the entropy of the other weights alone,
N = e^{H_q} the effective number of competitors, and

    x = l - E_q[l']      the margin of its logit over the mean logit of the others, weighted as they are,

the entropy is a function of x and N alone, whatever the logits:

    H(x) = ln(e^x + N) - x e^x / (e^x + N),      dH/dx = -p (1 - p) x.

So a boost lowers H from the start if x >= 0; if x < 0, H first rises, up to ln(1 + N) at x = 0, and is lower than
before only once the boost exceeds a critical one between |x| and 2 |x|. All functions work on tensors of any shape,
float64 for exactness; entropies in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 60
"""Halvings of the bracket of the critical boost: to the last bit of float64."""


def margin_entropy(margin: Tensor, competitors: Tensor) -> Tensor:
    """Return H(x) of a row by one key's margin x and the effective number N >= 1 of its competitors."""
    log_competitors = competitors.log()
    log_norm = torch.logaddexp(margin, log_competitors)
    return log_norm - margin * (margin - log_norm).exp()


def entropy_slope(margin: Tensor, competitors: Tensor) -> Tensor:
    """Return dH/dx = -p (1 - p) x with p = 1 / (1 + N e^{-x})."""
    share = torch.sigmoid(margin - competitors.log())
    return -share * (1 - share) * margin


def largest_entropy(competitors: Tensor) -> Tensor:
    """Return the maximum of H over all boosts, ln(1 + N), which is reached at x = 0."""
    return torch.log1p(competitors)


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
class KeyMargin:
    """How one key of a row stands to the others."""

    margin: Tensor
    """x, nats."""
    competitors: Tensor
    """N = e^{H_q}."""
    share: Tensor
    """p."""


def key_margin(score: Tensor, *, entropy: Tensor, log_sum_exp: Tensor, mean_score: Tensor) -> KeyMargin:
    """Return the margin of a key from its score and three statistics of its row, all broadcast together.

    NaN where the key has all the weight to within rounding, so that nothing is known of the others.
    """
    share = (score - log_sum_exp).exp()
    rest = 1 - share
    others_mean = (mean_score - share * score) / rest
    binary = torch.special.entr(share) + torch.special.entr(rest)
    others_entropy = ((entropy - binary) / rest).clamp(min=0)
    known = rest > torch.finfo(share.dtype).eps ** 0.5
    return KeyMargin(
        torch.where(known, score - others_mean, torch.nan), torch.where(known, others_entropy.exp(), torch.nan), share
    )


# a set of keys boosted alike ------------------------------------------------------------------------------------


def set_entropy(log_odds: Tensor, meta_entropy: Tensor, text_entropy: Tensor) -> Tensor:
    """Return H = h(P) + P H_S + (1 - P) H_C by the log-odds of the set S (the chain rule)."""
    share = torch.sigmoid(log_odds)
    binary: Tensor = torch.special.entr(share) + torch.special.entr(1 - share)
    return binary + share * meta_entropy + (1 - share) * text_entropy


def set_entropy_slope(log_odds: Tensor, meta_entropy: Tensor, text_entropy: Tensor) -> Tensor:
    """Return dH/dD for a boost D of every key of S alike: -P (1 - P) (ln(P / (1 - P)) - (H_S - H_C))."""
    share = torch.sigmoid(log_odds)
    return -share * (1 - share) * (log_odds - (meta_entropy - text_entropy))


def largest_set_entropy(meta_entropy: Tensor, text_entropy: Tensor) -> Tensor:
    """Return the maximum over all boosts of S, ln(e^{H_S} + e^{H_C}); the limit of a large boost is H_S, not 0."""
    largest: Tensor = torch.logaddexp(meta_entropy, text_entropy)
    return largest


# the audit ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyBoosts:
    """How the meta keys of rows fare between two runs; (B, H, Q, M) each, NaN where nothing is known."""

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
        """True at boosts beyond the critical one, which need not be known for it: H is lower for the boost alone."""
        before = margin_entropy(self.margin, self.competitors)
        is_lower = margin_entropy(self.margin + self.boost, self.competitors) < before
        return (self.boost > 0) & ((self.margin >= 0) | is_lower)


@dataclass(frozen=True)
class RowAudit:
    """The theorem held against rows of one attention, with the meta-tokens' embedding and without; (B, H, Q) each."""

    entropy_without: Tensor
    """H of the ablated run, nats."""
    entropy_with: Tensor
    entropy_mechanism: Tensor
    """What the changed logits of the meta keys alone do to H, averaged over doing it first and last."""
    num_edges: Tensor
    """Edges to meta keys with a known margin."""
    num_above: Tensor
    """Of these, with x >= 0 in the ablated run: the premise of the theorem."""
    num_boosted: Tensor
    """With a boost D > 0."""
    num_beyond: Tensor
    """With a boost beyond the critical one: H is lower for it alone."""
    boosts: KeyBoosts
    """Of each edge to a meta key."""

    @property
    def drop(self) -> Tensor:
        """H without minus H with, nats; the paper's claim is that it is positive."""
        return self.entropy_without - self.entropy_with


def key_boosts(scores_without: Tensor, scores_with: Tensor, *, visible: Tensor, keys: Tensor) -> KeyBoosts:
    """Return the margin of some keys in the ablated run, and their boosts.

    The boost is how much a score rises more than those of its competitors, weighted as they are in the ablated run:
    softmax knows no common shift.

    Args:
        scores_without: (B, H, Q, K) scores of the ablated run.
        scores_with: (B, H, Q, K) scores of the full run.
        visible: (B, H, Q, K) bool.
        keys: (B, M) int64, indices of the keys to look at; -1 for none.
    """
    before, after = scores_without.double(), scores_with.double()
    weights = _weights(before, visible)
    before, after = torch.where(visible, before, 0), torch.where(visible, after, 0)
    log_norm = torch.where(visible, before, -torch.inf).logsumexp(-1, keepdim=True)
    mean_before, mean_after = ((weights * scores).sum(-1, keepdim=True) for scores in (before, after))
    entropy = torch.special.entr(weights).sum(-1, keepdim=True)

    index = keys.clamp(min=0)[:, None, None, :].expand(*before.shape[:3], -1)
    before, after, sees = before.gather(-1, index), after.gather(-1, index), visible.gather(-1, index)
    key = key_margin(before, entropy=entropy, log_sum_exp=log_norm, mean_score=mean_before)
    others_rise = (mean_after - mean_before - key.share * (after - before)) / (1 - key.share)
    is_none = ~sees | (keys < 0)[:, None, None, :]
    found = (key.margin, key.competitors, after - before - others_rise)
    return KeyBoosts(*(values.masked_fill(is_none, torch.nan) for values in found))


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
    meta = visible & is_meta[:, None, None, :]
    mixed = torch.where(meta, after, before), torch.where(meta, before, after)
    entropies = [_row_entropy(scores, visible) for scores in (before, after, *mixed)]
    boosts = key_boosts(before, after, visible=visible, keys=_indices_of(is_meta))
    known = boosts.is_known
    return RowAudit(
        entropy_without=entropies[0],
        entropy_with=entropies[1],
        entropy_mechanism=((entropies[2] - entropies[0]) + (entropies[1] - entropies[3])) / 2,
        num_edges=known.sum(-1),
        num_above=(known & (boosts.margin >= 0)).sum(-1),
        num_boosted=(known & (boosts.boost > 0)).sum(-1),
        num_beyond=(known & boosts.is_beyond).sum(-1),
        boosts=boosts,
    )


def _indices_of(members: Tensor) -> Tensor:
    """Return (B, M) int64, the indices of the members of each row in order, filled up with -1."""
    most = int(members.sum(-1).max())
    order = torch.argsort(~members, dim=-1, stable=True)[:, :most]
    return torch.where(members.gather(1, order), order, -1)


def _weights(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, scores, -torch.inf).softmax(-1)


def _row_entropy(scores: Tensor, visible: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(_weights(scores, visible)).sum(-1)
    return entropy
