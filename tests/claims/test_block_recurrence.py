"""The Block-Recurrent Transformer is its definition by loops, reads no future, and costs what its config says."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from baseline_models import RECURRENCES, baseline_model
from metatokens.baselines.masks import SparseAttentionConfig
from metatokens.baselines.recurrent import BlockRecurrentConfig
from metatokens.baselines.recurrent_reference import ReferenceRecurrence
from metatokens.config.loading import load_preset
from metatokens.errors import UsageError
from metatokens.evaluation.speed import describe_model
from metatokens.model.accounting import cache_bytes, count_parameters, forward_flops
from metatokens.training.initialization import build_model
from pairwise import all_pairs
from tiny_models import assert_close, attention_mask_of, gradients, tokens

ROWS = {
    "full": ("xx_xxxx_xxx", "x_xx_xxxx_x"),
    "padded": ("...xx_xxxx_", "xx.x_xx_x..", ".....x.....", "xxxxxxxxxxx"),
    "one_window": ("x_",),
}


def recurrent_attention(model: Any) -> Any:
    return model.model.layers[model.config.recurrence.recurrent_layer].self_attn


def logits_and_gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the tokens, and the gradients of a sum of them with weights of their own."""
    logits = model(ids, attention_mask=attention_mask_of(ids), use_cache=False).logits[attention_mask_of(ids).bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits * weights).sum().backward()
    return logits.detach(), gradients(model)


@all_pairs(name=RECURRENCES, rows=ROWS, encoding=("rope", "t5", "transformer_xl"), meta=("none", "all"))
def test_the_model_is_the_one_whose_recurrence_is_done_by_loops(name: str, rows: str, encoding: str, meta: str) -> None:
    ids = tokens(*ROWS[rows])
    fast, slow = (
        baseline_model(name, position_encoding=encoding, meta_attention_layers=meta, num_hidden_layers=3)
        for _ in range(2)
    )
    recurrent_attention(slow).recurrence.__class__ = ReferenceRecurrence
    logits, of_fast = logits_and_gradients(fast, ids)
    expected, of_slow = logits_and_gradients(slow, ids)
    assert_close(logits, expected, 1e-8)
    assert of_fast.keys() == of_slow.keys()
    for parameter, gradient in of_slow.items():
        assert_close(of_fast[parameter], gradient, 1e-8)


@pytest.mark.parametrize("name", RECURRENCES)
@torch.no_grad()
def test_a_later_token_moves_no_bit_of_an_earlier_logit(name: str) -> None:
    model, ids = baseline_model(name), tokens("xx_xxxx_xxx")
    before = model(ids).logits
    for column in range(11):
        changed = ids.clone()
        changed[0, column] = (ids[0, column] + 1) % 19
        after = model(changed).logits
        assert torch.equal(after[:, :column], before[:, :column]), column
        assert not torch.equal(after[:, column], before[:, column]), column


@torch.no_grad()
def test_the_state_reaches_beyond_all_windows_and_not_into_its_own() -> None:
    # in two layers with a window of 3 a token sees four tokens back
    model, ids = baseline_model("block_recurrent"), tokens("xxxxxxxxxxx")
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 19
    assert (model(other).logits - model(ids).logits)[0, 9:].abs().max() > 1e-4
    recurrent_attention(model).recurrence.token_o_proj.weight.zero_()
    assert torch.equal(model(other).logits[0, 5:], model(ids).logits[0, 5:])
    assert not torch.equal(model(other).logits[0, 4], model(ids).logits[0, 4])


@pytest.mark.parametrize("rows", ["full", "one_window"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_a_step_of_training_touches_every_parameter(name: str, rows: str) -> None:
    model, ids = baseline_model(name).train(), tokens(*ROWS[rows])
    model(ids, labels=ids).loss.backward()
    assert gradients(model).keys() == {parameter for parameter, _ in model.named_parameters()}


@torch.no_grad()
def test_initial_weights_are_those_of_the_authors_code() -> None:
    attention = {"kind": "block_recurrent", "window": 8, "num_state_vectors": 64, "recurrent_layer": 1, "gates": "dual"}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    settings = load_preset("tiny/plain").model.model_validate({**shape, "attention": attention})
    model = build_model(settings, text_vocab_size=60, eos_token_id=0, seed=0)
    recurrence = recurrent_attention(model).recurrence
    deviations = {
        0.1: (recurrence.initial_state, recurrence.gate.bias, recurrence.mlp_gate.bias),
        1.0: (recurrence.state_ids,),
        0.02: (recurrence.q_proj.weight, recurrence.o_proj.weight),
        0.01: (recurrence.token_o_proj.weight,),  # 0.02 / sqrt(2 x 2 layers)
    }
    for expected, drawn in deviations.items():
        for tensor in drawn:
            assert tensor.std().item() == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("name", RECURRENCES)
@torch.no_grad()
def test_parameters_and_operations_of_the_recurrence_are_counted(name: str) -> None:
    model = baseline_model(name).requires_grad_(False)
    config = model.config
    assert count_parameters(config).total == model.num_parameters()
    pattern = {"kind": "sliding_window", "window": config.recurrence.window}
    fields = {key: value for key, value in config.to_dict().items() if key not in ("attention_pattern", "model_type")}
    without = SparseAttentionConfig(**fields, attention_pattern=pattern)
    for length in (config.recurrence.window, 4 * config.recurrence.window):
        recurrence = recurrent_attention(model).recurrence
        inputs: list[Any] = []
        hook = recurrence.register_forward_pre_hook(lambda _, args, kept=inputs: kept.extend(args))
        model(tokens("x" * length), use_cache=False)
        hook.remove()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            recurrence(*inputs)
        counted = forward_flops(config, num_positions=length) - forward_flops(without, num_positions=length)
        assert counted == counter.get_total_flops()


@pytest.mark.parametrize("name", RECURRENCES)
@torch.no_grad()
def test_the_bytes_of_the_cache_are_those_that_info_counts(name: str) -> None:
    model = baseline_model(name)
    config, cache = model.config, DynamicCache(config=model.config)
    model(tokens("x" * 11), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # the count of tokens, one a row, is left out
    held += sum(tensor.nbytes for tensor in cache.layers[config.recurrence.recurrent_layer].carried[:-1])
    assert held == cache_bytes(config, num_positions=11, bytes_per_number=8).total
    described = describe_model(config)["cache_of_1024_positions_text_bytes"]
    assert described == cache_bytes(config, num_positions=1024).total


@torch.no_grad()
def test_a_state_cannot_be_taken_back_nor_kept_by_another_cache() -> None:
    model, ids = baseline_model("block_recurrent"), tokens("xxxx")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot forget its newest tokens"):
        cache.crop(-1)
    for other in (DynamicCache(config=baseline_model("sliding_window").config), DynamicCache()):
        with pytest.raises(ValueError, match=r"no place for the state: use DynamicCache\(config=model\.config\)"):
            model(ids, past_key_values=other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_state_vectors": 0}, "num_state_vectors must be at least 1, not 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 64}, "window 64 must be less than max_position_embeddings 64"),
        ({"recurrent_layer": 2}, r"recurrent_layer 2 is outside 0\.\.1"),
        ({"gates": "single"}, "gates must be .* not 'single'"),
        ({"kind": "sliding_window"}, "kind must be one of .*block_recurrent"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    fields = {"num_hidden_layers": 2, "max_position_embeddings": 64}
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=words):
        BlockRecurrentConfig(**fields, attention_pattern={**RECURRENCES["block_recurrent"], **change})


def test_a_plain_pattern_has_no_state() -> None:
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="not 'block_recurrent'"):
        SparseAttentionConfig(attention_pattern=RECURRENCES["block_recurrent"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("window", "64"), "data.block_size 230 is not a multiple of model.attention.window 64"),
        (("window", "256"), "model.attention.window 256 must be less than model.max_position_embeddings 256"),
        (("recurrent_layer", "4"), "model.attention.recurrent_layer 4 is beyond the 4 layers"),
    ],
)
def test_a_run_whose_windows_do_not_fit_is_refused_by_its_keys(overrides: tuple[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("tiny/block-recurrent", [f"--model.attention.{overrides[0]}", overrides[1]])
    assert words in str(caught.value)
