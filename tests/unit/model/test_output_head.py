"""The loss is that of the model's own logits, whatever sits on the output head, and losses of the user's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm

from metatokens.baselines import LandmarkForCausalLM, SparseAttentionForCausalLM
from metatokens.model import MetaTokenForCausalLM
from metatokens.model import loss as loss_module
from metatokens.model.loss import is_plain_linear, targets_of_labels
from tiny_models import META, assert_close, gradients, tiny_model, tokens

IDS = tokens("x_xx_x_x", "xx__xxxx")


class Doubled(Tensor):
    """A weight of another kind than torch's own, such as quantised weights are: what is multiplied is its double."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            hidden, weight = args[:2]
            return hidden @ (2 * weight.as_subclass(Tensor)).T
        return super().__torch_function__(func, types, args, kwargs or {})


def put_lora(model: MetaTokenForCausalLM) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).double()


def put_forward(model: MetaTokenForCausalLM) -> None:
    head, forward = model.lm_head, model.lm_head.forward
    head.forward = lambda hidden: 3 * forward(hidden)


def put_weight_of_another_kind(model: MetaTokenForCausalLM) -> None:
    weight = model.lm_head.weight.detach().as_subclass(Doubled)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)


def put_bias(model: MetaTokenForCausalLM) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size, dtype=torch.float64))


def put_layer_after(model: MetaTokenForCausalLM) -> None:
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


SITTING_ON_THE_HEAD: dict[str, Callable[[MetaTokenForCausalLM], Any]] = {
    "bias": put_bias,
    "layer": put_layer_after,
    "lora": put_lora,
    "forward_hook": lambda model: model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits),
    "forward_pre_hook": lambda model: model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "backward_hook": lambda model: model.lm_head.register_full_backward_hook(
        lambda _, given, __: tuple(2 * gradient for gradient in given)
    ),
    "parametrization": lambda model: weight_norm(model.lm_head),
    "other_forward": put_forward,
    "other_kind_of_weight": put_weight_of_another_kind,
    "offloaded_weights": cpu_offload,
}


@pytest.fixture(name="doubled_outputs_of_every_linear_layer")
def fixture_doubled_outputs_of_every_linear_layer() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, _, out: 2 * out if type(module) is nn.Linear else out)
    yield
    handle.remove()


def untied_model(**changes: Any) -> MetaTokenForCausalLM:
    return tiny_model(dtype=torch.float64, tie_word_embeddings=False, **changes)


def loss_of_logits(model: MetaTokenForCausalLM) -> Tensor:
    """Take the loss from the logits that the model gives without labels: the slow reference."""
    targets = targets_of_labels(IDS, IDS == META, model.config.loss_policy)
    return cross_entropy(model(IDS).logits.flatten(0, 1), targets.flatten())


def assert_loss_is_that_of_the_logits(model: MetaTokenForCausalLM) -> None:
    results = []
    for loss in (model(IDS, labels=IDS).loss, loss_of_logits(model)):
        model.zero_grad(set_to_none=True)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, found), (expected_loss, expected) = results
    assert_close(loss, expected_loss, 1e-12)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-10)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", SITTING_ON_THE_HEAD)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_loss_and_gradients_are_those_of_the_logits_whatever_sits_on_the_head(kind: str, is_training: bool) -> None:
    model = untied_model()
    SITTING_ON_THE_HEAD[kind](model)
    assert_loss_is_that_of_the_logits(model.train(is_training))


@pytest.mark.usefixtures("doubled_outputs_of_every_linear_layer")
def test_loss_is_that_of_the_logits_under_a_hook_on_every_module() -> None:
    assert_loss_is_that_of_the_logits(untied_model().train())


@pytest.mark.parametrize("kind", ["lora", "forward_hook"])
@pytest.mark.parametrize("model_class", [SparseAttentionForCausalLM, LandmarkForCausalLM])
def test_what_sits_on_the_head_of_a_baseline_counts(model_class: Any, kind: str) -> None:
    config = model_class.config_class(**untied_model().config.to_diff_dict())
    torch.manual_seed(0)
    model = model_class(config).double().train()
    SITTING_ON_THE_HEAD[kind](model)
    assert_loss_is_that_of_the_logits(model)


def test_loss_of_a_head_with_something_on_it_holds_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    num_positions: list[int] = []
    model = untied_model().train()
    model.lm_head.register_forward_hook(lambda _, __, logits: num_positions.append(logits.shape[1]))
    whole = model(IDS, labels=IDS).loss
    whole.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK_ELEMENTS", 3 * len(IDS) * model.config.vocab_size)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert sorted(num_positions) == sorted([8, *[3, 3, 2] * 2])  # the chunks again for the backward pass
    assert_close(loss, whole, 1e-12)
    for name, gradient in expected.items():
        assert_close(gradients(model)[name], gradient, 1e-10)


@pytest.mark.parametrize("logits_to_keep", [0, 1])
@torch.no_grad()
def test_evaluation_calls_a_head_with_something_on_it_once(logits_to_keep: int) -> None:
    shapes = []
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[:2]))
    model(IDS, labels=IDS, logits_to_keep=logits_to_keep)
    assert shapes == [IDS.shape]


def test_head_stays_plain_when_the_embedding_is_resized() -> None:
    model = tiny_model()
    assert is_plain_linear(model.lm_head)
    model.resize_token_embeddings(32, mean_resizing=False)
    assert is_plain_linear(model.lm_head)


@pytest.mark.parametrize("logits_to_keep", [0, 1, torch.tensor([2, 5])])
@torch.no_grad()
def test_logits_to_keep_changes_no_loss_of_a_head_with_something_on_it(logits_to_keep: int | Tensor) -> None:
    model = untied_model()
    model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    output = model(IDS, labels=IDS, logits_to_keep=logits_to_keep)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    assert_close(output.loss, loss_of_logits(model), 1e-12)
    assert_close(output.logits, model(IDS).logits[:, kept], 1e-12)


# Losses of the user's own -----------------------------------------------------------------------------------------


def test_logits_of_a_training_step_are_made_where_the_model_is_told_to() -> None:
    model = tiny_model().train()
    assert model(IDS, labels=IDS).logits is None
    model.makes_logits_in_training = True
    output = model(IDS, labels=IDS)
    assert_close(output.logits, model(IDS).logits, 1e-6)
    assert_close(output.loss, loss_of_logits(model), 1e-5)


@pytest.mark.parametrize("policy", ["skip", "retarget"])
def test_loss_function_that_was_set_gets_all_logits_and_the_targets_of_the_policy(policy: str) -> None:
    model = tiny_model(loss_policy=policy).train()
    given: dict[str, Any] = {}

    def loss_function(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        given.update(logits=logits, labels=labels, **others)
        return logits.square().mean()

    model.loss_function = loss_function
    output = model(IDS, labels=IDS, logits_to_keep=1, num_items_in_batch=5)
    assert_close(output.loss, model(IDS).logits.square().mean(), 1e-6)
    assert output.logits.shape[1] == 1
    assert given["labels"].equal(IDS.masked_fill(IDS == META, -100))
    assert given["shift_labels"].equal(targets_of_labels(IDS, IDS == META, policy))
    assert (given["vocab_size"], given["num_items_in_batch"]) == (model.config.vocab_size, 5)
    assert given["logits"].shape[:2] == IDS.shape
