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

from metatokens.analysis.attention.rows import binary_entropy

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


def key_boosts(scores_without: Tensor, scores_with: Tensor, *, visible: Tensor, keys: Tensor) -> KeyBoosts:
    """Return the margin of some keys in the ablated run, and their boosts.

    The boost is the rise of a key's score minus the mean rise of its competitors, weighted as in the ablated run:
    a common shift of all scores changes no weight. NaN where a key has all the weight to within rounding, so that
    nothing is known of the others.

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
    meta = visible & is_meta[:, None, None, :]
    mixed = torch.where(meta, after, before), torch.where(meta, before, after)
    entropies = [_row_entropy(scores, visible) for scores in (before, after, *mixed)]
    return RowAudit(
        entropies[0],
        entropies[1],
        ((entropies[2] - entropies[0]) + (entropies[1] - entropies[3])) / 2,
        key_boosts(before, after, visible=visible, keys=_indices_of(is_meta)),
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
