"""The training of a stack: when it ends, which weights it keeps, and that no head depends on the others."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from metatokens.analysis.compression.heads import Parameters, fit_stack, select_heads, split_documents
from metatokens.config.analysis import HeadTraining
from metatokens.errors import NumericError, UsageError

GOALS = torch.tensor([0.0, 1.0, 3.0])


def distance_to(goals: Tensor, calls: list[int]) -> object:
    """Return a loss, one a head, and count how often it is asked."""

    def loss(parameters: Parameters) -> Tensor:
        calls.append(1)
        return (parameters["x"] - goals).square()

    return loss


def test_the_stack_ends_when_every_head_is_done_and_says_which_ran_out_of_steps():
    calls = []
    training = HeadTraining(max_steps=400, evaluation_interval_steps=5, patience_evaluations=3, learning_rate=0.02)
    loss = distance_to(GOALS, calls)
    fit = fit_stack({"x": torch.zeros(3)}, loss, lambda now: (now["x"] - GOALS).square(), training)
    assert fit.converged.all()
    assert len(calls) < 400
    torch.testing.assert_close(fit.parameters["x"], GOALS, atol=0.1, rtol=0)
    short = training.model_copy(update={"max_steps": 20})
    fit = fit_stack({"x": torch.zeros(3)}, loss, lambda now: (now["x"] - GOALS).square(), short)
    assert fit.converged.tolist() == [True, False, False]


def test_patience_counts_looks_without_a_change():
    calls = []
    training = HeadTraining(max_steps=400, evaluation_interval_steps=10, patience_evaluations=10, min_change=100)
    fit_stack({"x": torch.zeros(3)}, distance_to(GOALS, calls), lambda now: (now["x"] - GOALS).square(), training)
    # the first look, at the first weights, counts as a change; then ten without one
    assert len(calls) == 100


def test_a_head_keeps_the_weights_of_its_lowest_validation_loss():
    # training moves the weight to 3, validation wants 1
    training = HeadTraining(max_steps=300, evaluation_interval_steps=1, learning_rate=0.02, patience_evaluations=300)
    first = {"x": torch.zeros(1)}
    fit = fit_stack(first, distance_to(torch.tensor([3.0]), []), lambda now: (now["x"] - 1).square(), training)
    assert float(fit.parameters["x"]) == pytest.approx(1, abs=0.02)
    assert float(first["x"]) == 0


def test_a_head_without_a_finite_loss_is_an_error():
    training = HeadTraining(max_steps=2)
    with pytest.raises(NumericError, match="validation loss of a head"):
        fit_stack({"x": torch.zeros(2)}, distance_to(torch.ones(2), []), lambda now: now["x"] * math.nan, training)


def test_heads_are_selected_one_by_one():
    first, other = {"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)}
    assert select_heads(np.array([True, False]), first, other)["w"].tolist() == [[0] * 3, [1] * 3]


def test_a_split_keeps_documents_whole_and_is_pure_in_its_arguments():
    documents = np.arange(200) // 2
    training = HeadTraining()
    split, again, other = (split_documents(documents, training, seed=seed) for seed in (0, 0, 1))
    parts = [set(documents[part].tolist()) for part in split]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert len(set.union(*parts)) == 100
    assert all(np.array_equal(a, b) for a, b in zip(split, again, strict=True))
    assert not np.array_equal(split.test, other.test)
    with pytest.raises(UsageError, match="at least 8, found 3"):
        split_documents(np.arange(20), training, seed=0)
