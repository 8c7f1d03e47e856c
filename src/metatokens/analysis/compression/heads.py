"""Train many small heads on fixed states at once: stacked weights, one batched product for all of them.

A stack holds G heads of one shape that differ in their seed, their labels or their training states. Every parameter is
a tensor (G, ...), the heads share no term of the loss, Adam works element by element, and each head draws from a
generator of its own: so a head ends with the weights that it would have alone, up to rounding, at a fraction of the
time. Also here: the split by document, since tokens of one document are not independent, and standardised states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from metatokens.analysis.inputs.subject import Inputs
from metatokens.config.analysis import HeadTraining
from metatokens.errors import NumericError
from metatokens.evaluation.significance import check_documents

_ROUNDING = 1e-6  # of the largest deviation; states are float32

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]
Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]
"""Maps the parameters of a stack to one loss a head, (G,)."""


class Split(NamedTuple):
    """Indices of the states of each part; no document is in two of them."""

    train: Indices
    validation: Indices
    test: Indices


class Fit(NamedTuple):
    """What the training of a stack ends with, each head at its lowest validation loss."""

    parameters: Parameters
    converged: npt.NDArray[np.bool_]
    """(G,): False where the steps ran out first."""


@dataclass(frozen=True)
class LabelledStates:
    """States with their labels as classes."""

    states: Array
    """(n, C)"""
    classes: Indices
    """(n,) in 0..num_classes - 1, in the order of the labels' values."""
    num_classes: int
    document_ids: npt.NDArray[np.int64]
    """(n,)"""

    @classmethod
    def check(cls, states: npt.ArrayLike, labels: npt.ArrayLike, document_ids: npt.ArrayLike) -> LabelledStates:
        """Return states, labels and documents that belong together.

        Args:
            states: (n, C) finite.
            labels: (n,) of any comparable kind, such as token ids.
            document_ids: (n,) integers.

        Raises:
            ValueError: shapes that do not fit, fewer than two labels, or a state that is not finite.
        """
        values, documents = np.asarray(states, dtype=np.float64), np.asarray(document_ids)
        names, classes = np.unique(np.asarray(labels), return_inverse=True)
        if values.ndim != 2 or classes.shape != values.shape[:1] or documents.shape != values.shape[:1]:
            raise ValueError(
                "states (n, C), labels (n,) and document ids (n,) are needed, not shapes "
                f"{values.shape}, {classes.shape} and {documents.shape}"
            )
        if len(names) < 2 or not np.isfinite(values).all():
            raise ValueError(f"finite states with at least two labels are needed, not {len(names)} labels")
        return cls(values, classes.astype(np.int64), len(names), documents.astype(np.int64))

    def standardized(self, train: Indices) -> Tensor:
        """Return the states (n, C) float32 with mean 0 and deviation 1 over those to train on, by dimension."""
        mean, deviation = self.states[train].mean(axis=0), self.states[train].std(axis=0)
        # a dimension that does not move but for rounding stays 0, or a probe would read the rounding
        moves = deviation > _ROUNDING * deviation.max()
        scaled = np.where(moves, (self.states - mean) / np.where(moves, deviation, 1), 0)
        return torch.from_numpy(scaled.astype(np.float32))


def split_documents(document_ids: npt.ArrayLike, training: HeadTraining, *, seed: int) -> Split:
    """Split states by document, shuffled; a pure function of the documents, the shares and the seed.

    Raises:
        UsageError: a test part of fewer documents than `minimum_documents`, or no document to validate on.
    """
    documents = np.asarray(document_ids)
    shuffled = random_generator(seed, "split").permutation(np.unique(documents))
    num_train = round(training.train_share * len(shuffled))
    num_validation = max(1, round(training.validation_share * len(shuffled)))
    check_documents(len(shuffled) - num_train - num_validation, training.minimum_documents)
    parts = np.split(shuffled, [num_train, num_train + num_validation])
    train, validation, test = (np.flatnonzero(np.isin(documents, part)) for part in parts)
    return Split(train, validation, test)


def fit_stack(parameters: Parameters, loss_fn: Loss, validation_loss_fn: Loss, training: HeadTraining) -> Fit:
    """Train a stack by Adam until every head is done; the parameters passed in are not changed.

    A head is done when `patience_evaluations` looks at its validation loss in a row found no fall of more than
    `min_change`. It keeps the weights of its lowest validation loss, whatever the rest of the stack does.

    Args:
        parameters: (G, ...) each.
        loss_fn: the loss of a fresh batch, (G,); called once a step.
        validation_loss_fn: (G,); the same number for the same weights, so that looks can be compared.
        training: steps, rate and patience.

    Raises:
        NumericError: a head that had no finite validation loss.
    """
    current = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    num_heads = len(next(iter(current.values())))
    optimizer = torch.optim.Adam(current.values(), lr=training.learning_rate)
    best = {name: value.detach().clone() for name, value in current.items()}
    lowest, reference = torch.full((num_heads,), math.inf), torch.full((num_heads,), math.inf)
    stale, active = torch.zeros(num_heads, dtype=torch.long), torch.ones(num_heads, dtype=torch.bool)
    for step in range(training.max_steps + 1):
        if step:
            optimizer.zero_grad()
            loss_fn(current).sum().backward()
            optimizer.step()
        if step % training.evaluation_interval_steps and step != training.max_steps:
            continue
        with torch.no_grad():
            losses = validation_loss_fn(current)
        improved = active & (losses < lowest)
        lowest = torch.where(improved, losses, lowest)
        for name, value in current.items():
            best[name][improved] = value.detach()[improved]
        changed = losses < reference - training.min_change
        reference = torch.where(changed, losses, reference)
        stale = torch.where(changed, 0, stale + 1)
        active &= stale < training.patience_evaluations
        if not active.any():
            break
    if not lowest.isfinite().all():
        raise NumericError(
            "validation loss of a head",
            expected="a finite number",
            found=str(lowest.tolist()),
            remedy="lower learning_rate, or look at the states",
        )
    return Fit(best, (~active).numpy())


def note_unfinished(inputs: Inputs, part: str, heads: str, converged: npt.NDArray[np.bool_]) -> None:
    """Say how many of these heads ran out of steps, if any did."""
    if not converged.all():
        inputs.skip(f"{part}: {int((~converged).sum())} of {converged.size} {heads} ran out of steps")


def select_heads(choose_first: npt.NDArray[np.bool_], first: Parameters, other: Parameters) -> Parameters:
    """Return the parameters of `first` for the heads where True, of `other` for the rest."""
    chosen = torch.from_numpy(choose_first)
    return {
        name: torch.where(chosen.view(-1, *[1] * (value.dim() - 1)), first[name], value)
        for name, value in other.items()
    }


def stack_generators(num_heads: int, *, seed: int, purpose: str) -> list[torch.Generator]:
    """Return one generator a head; head i has the same one in every stack."""
    return [
        torch.Generator().manual_seed(int(random_generator(seed, purpose, head).integers(2**63 - 1)))
        for head in range(num_heads)
    ]


def init_linear(generators: list[torch.Generator], num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Return weights (G, inputs, outputs) and biases (G, 1, outputs), uniform as those of `torch.nn.Linear`."""
    bound = 1 / math.sqrt(num_inputs)
    drawn = torch.stack([torch.rand(num_inputs + 1, num_outputs, generator=one) for one in generators])
    drawn = (2 * drawn - 1) * bound
    return drawn[:, :-1].contiguous(), drawn[:, -1:].contiguous()


def draw_batches(generators: list[torch.Generator], num_states: int, batch_size: int) -> Tensor:
    """Return indices (G, batch_size) below the number of states, with replacement."""
    return torch.stack([torch.randint(num_states, (batch_size,), generator=one) for one in generators])


def draw_normal(generators: list[torch.Generator], *shape: int) -> Tensor:
    """Return standard normal numbers (G, *shape)."""
    return torch.stack([torch.randn(*shape, generator=one) for one in generators])


def linear(inputs: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Apply each head's layer: (G, n, inputs), or (n, inputs) for all heads alike, to (G, n, outputs)."""
    if inputs.dim() == 2:
        inputs = inputs.expand(len(weights), *inputs.shape)
    return torch.baddbmm(biases, inputs, weights)


def cross_entropies(logits: Tensor, classes: Tensor) -> Tensor:
    """Return -ln p(class) in nats, (G, n), of logits (G, n, classes) and classes (G, n) or (n,)."""
    targets = classes.expand(logits.shape[:2]).reshape(-1)
    return functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(logits.shape[:2])


def label_entropy(labels: npt.ArrayLike) -> float:
    """Return the entropy of the labels' own frequencies in nats."""
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def corrected_entropy(labels: npt.ArrayLike) -> float:
    """Return the entropy in nats of what labels (n,) are drawn from, as Miller (1955) corrects it.

    That of their own frequencies is too small by about (K - 1) / 2n, for K labels that occur.
    """
    classes = np.unique(np.asarray(labels))
    return label_entropy(labels) + (len(classes) - 1) / (2 * len(np.asarray(labels)))


def frequency_code(classes: Indices, train_classes: Indices, num_classes: int) -> Array:
    """Return -ln of each class's frequency among those trained on, plus one half each (Krichevsky, Trofimov 1981).

    The best predictor that sees no state; the half keeps a class that was never seen possible.
    """
    counts = np.bincount(train_classes, minlength=num_classes) + 0.5
    code: Array = -np.log(counts / counts.sum())[classes]
    return code


def random_generator(seed: int, purpose: str, head: int = 0) -> np.random.Generator:
    """Return a generator (PCG64) of its own for each purpose and head."""
    return np.random.Generator(np.random.PCG64([seed, head, *purpose.encode()]))
