"""The chunked loss: equal to torch's cross-entropy in value and gradients, in a fraction of its memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metatokens.model import loss as loss_module
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS, summed_cross_entropy, targets_of_labels
from tiny_models import assert_close

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# several chunks of 8,388 rows, the last one short
LARGE_ROWS, LARGE_VOCAB = 20_000, 1_000


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.flatten(0, -2) @ weight.T
    return cross_entropy(logits, targets.flatten(), reduction="sum")


def inputs(
    *shape: int, width: int = 6, vocab_size: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, width, dtype=dtype, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, vocab_size, shape, generator=generator)


def value_and_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    total = loss(hidden, weight, targets)
    # a factor, because in a training step the gradient that arrives is not one
    gradients = torch.autograd.grad(3 * total, [tensor for tensor in (hidden, weight) if tensor.requires_grad])
    return total.detach(), *gradients


def assert_equal_to_plain(hidden: Tensor, weight: Tensor, targets: Tensor, tolerance: float) -> None:
    actual = value_and_gradients(summed_cross_entropy, hidden, weight, targets)
    expected = value_and_gradients(plain, hidden, weight, targets)
    for of_ours, of_torch in zip(actual, expected, strict=True):
        assert_close(of_ours, of_torch, tolerance)


def test_loss_and_gradients_equal_torchs_cross_entropy() -> None:
    assert_equal_to_plain(*inputs(3, 7), tolerance=1e-12)


def test_ignored_targets_cost_nothing_and_have_no_gradient() -> None:
    hidden, weight, targets = inputs(3, 7)
    targets[:, ::2] = -100
    assert_equal_to_plain(hidden, weight, targets, 1e-12)
    gradient = value_and_gradients(summed_cross_entropy, hidden, weight, targets)[1]
    assert not gradient[:, ::2].any()
    assert gradient[:, 1::2].all()


def test_loss_without_any_target_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = inputs(3, 7)
    for value in value_and_gradients(summed_cross_entropy, hidden, weight, torch.full_like(targets, -100)):
        assert not value.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_argument_is_right_when_the_other_is_frozen(frozen: int) -> None:
    arguments = inputs(3, 7)
    arguments[frozen].requires_grad_(False)
    assert_equal_to_plain(*arguments, tolerance=1e-12)


def test_loss_over_several_chunks_equals_torchs_cross_entropy() -> None:
    hidden, weight, targets = inputs(LARGE_ROWS, width=4, vocab_size=LARGE_VOCAB)
    targets[::5] = -100
    ours, of_torch = (value_and_gradients(loss, hidden, weight, targets) for loss in (summed_cross_entropy, plain))
    for actual, expected in zip(ours, of_torch, strict=True):
        assert_close(actual, expected, 1e-9)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


def test_no_full_matrix_of_logits_exists_forward_or_backward() -> None:
    arguments = inputs(LARGE_ROWS, width=4, vocab_size=LARGE_VOCAB, dtype=torch.float32)
    with LargestTensor() as of_ours:
        value_and_gradients(summed_cross_entropy, *arguments)
    with LargestTensor() as of_torch:
        value_and_gradients(plain, *arguments)
    assert of_torch.num_elements == LARGE_ROWS * LARGE_VOCAB
    assert of_ours.num_elements <= LOGITS_CHUNK_ELEMENTS < LARGE_ROWS * LARGE_VOCAB


class MatrixProducts(TorchDispatchMode):
    """Counts the products of matrices."""

    num_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def test_without_gradients_the_loss_takes_the_logits_and_no_product_more() -> None:
    hidden, weight, targets = inputs(3, 7)
    with MatrixProducts() as with_gradients:
        loss = summed_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), MatrixProducts() as without:
        assert torch.equal(summed_cross_entropy(hidden, weight, targets), loss)
    assert (without.num_products, with_gradients.num_products) == (1, 3)


def test_loss_of_bfloat16_states_is_summed_in_float32() -> None:
    hidden, weight, targets = inputs(64, 8, dtype=torch.bfloat16)
    total, *gradients = value_and_gradients(summed_cross_entropy, hidden, weight, targets)
    assert total.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.bfloat16]
    expected = plain((hidden @ weight.T).float(), torch.eye(11), targets)
    assert_close(total, expected, 1e-3)


def test_loss_under_autocast_has_float32_gradients_near_those_without() -> None:
    hidden, weight, targets = inputs(16, 8, dtype=torch.float32)
    exact = value_and_gradients(summed_cross_entropy, hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = value_and_gradients(summed_cross_entropy, hidden, weight, targets)
    for actual, expected in zip(rounded, exact, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.02 * expected.norm()


def second_derivatives(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Differentiate a product of the gradient with a vector; the hidden states come from the weight, as if tied."""
    states = (hidden @ weight[:6]).tanh()
    (gradient,) = torch.autograd.grad(loss(states, weight, targets), weight, create_graph=True)
    return torch.autograd.grad((gradient * gradient.detach().sin()).sum(), (hidden, weight))


@pytest.mark.parametrize("chunk_rows", [21, 4])
def test_second_derivatives_equal_those_of_torchs_cross_entropy(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = inputs(3, 7)
    targets[:, ::3] = -100
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK_ELEMENTS", chunk_rows * len(weight))
    ours, of_torch = (second_derivatives(loss, hidden, weight, targets) for loss in (summed_cross_entropy, plain))
    for actual, expected in zip(ours, of_torch, strict=True):
        assert_close(actual, expected, 1e-10)


def test_second_derivative_in_the_states_is_right_when_the_weight_is_frozen() -> None:
    hidden, weight, targets = inputs(2, 3)
    weight.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda states: summed_cross_entropy(states, weight, targets), hidden)


META_MASK = torch.tensor([[False, True, False, False, True, True, False]])
LABELS = torch.tensor([[1, 99, 2, 3, 99, 99, 4]])


def test_skip_drops_the_terms_whose_target_is_a_meta_token() -> None:
    targets = targets_of_labels(LABELS, META_MASK, "skip")
    assert targets.tolist() == [[-100, 2, 3, -100, -100, 4, -100]]


def test_retarget_predicts_the_next_text_token_from_the_last_one() -> None:
    targets = targets_of_labels(LABELS, META_MASK, "retarget")
    assert targets.tolist() == [[2, -100, 3, 4, -100, -100, -100]]


@pytest.mark.parametrize("policy", ["skip", "retarget"])
def test_ignored_text_label_is_no_target(policy: str) -> None:
    labels = LABELS.clone()
    labels[0, 3] = -100
    remaining = targets_of_labels(labels, META_MASK, policy)
    assert sorted(remaining[remaining != -100].tolist()) == [2, 4]
