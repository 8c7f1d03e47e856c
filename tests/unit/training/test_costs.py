import json

import numpy as np
import pytest
import torch

from commands import error_line, metatokens
from metatokens.baselines.building import build_config
from metatokens.config.schema import PretrainConfig
from metatokens.data.injection import inject_meta_tokens, sample_meta_positions
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.accounting import activation_bytes
from metatokens.training.costs import Parallel, count_memory, plan_run

BLOCK_SIZE = 120  # no weight has as many rows as a batch has positions
ROWS = 2
KINDS: tuple[Parallel, ...] = ("ddp", "fsdp2")
VOCABULARY = 62  # so that the head is small beside the blocks


def make_config(*, precision: str = "float32", ratio: float = 0.1, **model: object) -> PretrainConfig:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": BLOCK_SIZE}
    return PretrainConfig.model_validate(
        {
            "model": shape | model,
            "data": {"block_size": BLOCK_SIZE},
            "injection": {"kind": "uniform", "ratio": ratio},
            "training": {"batch_blocks": 8, "micro_batch_blocks": ROWS, "precision": precision},
        }
    )


def saved_for_backward(config: PretrainConfig, model: MetaTokenForCausalLM) -> int:
    """Return the bytes that autograd keeps of a forward pass of the decoder, without the weights and their casts."""
    weights = {tuple(parameter.shape) for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if weights.isdisjoint({tuple(tensor.shape), tuple(reversed(tensor.shape))}):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    positions = sample_meta_positions(
        config.injection, sample_ids=np.arange(ROWS), block_size=BLOCK_SIZE, seed=0, epoch=0
    )
    text = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, config.text_tokens_per_block + 1))
    batch = inject_meta_tokens(text, positions, meta_token_id=VOCABULARY, loss_policy="skip")
    inputs = batch.to_model_inputs(device="cpu")
    bfloat16 = config.training.precision == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
    ):
        model.model(inputs["input_ids"], meta_indices=inputs["meta_indices"], use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config(ratio=0.4),
        make_config(precision="bfloat16", ratio=0.4),
        make_config(meta_attention_layers="none", position_encoding="learned"),
        make_config(meta_attention_layers=(1,), ratio=0.4, intermediate_size=96),
    ],
    ids=["meta", "many", "bfloat16", "plain", "one layer"],
)
def test_activations_are_what_autograd_keeps(config: PretrainConfig) -> None:
    model_config = build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0)
    counted = ROWS * activation_bytes(
        model_config,
        num_positions=BLOCK_SIZE,
        num_meta=BLOCK_SIZE - config.text_tokens_per_block,
        bfloat16=config.training.precision == "bfloat16",
    )
    kept = saved_for_backward(config, MetaTokenForCausalLM(model_config).train())
    assert counted == pytest.approx(kept, rel=0.05)


def test_checkpointing_keeps_less_than_all_blocks() -> None:
    config = build_config(make_config().model, text_vocab_size=VOCABULARY, eos_token_id=0)
    one, all_ = (activation_bytes(config, num_positions=128, checkpointed=flag) for flag in (True, False))
    width, layers = config.hidden_size, config.num_hidden_layers
    assert all_ / layers < one < all_ / layers + (layers + 2) * 128 * width * 4


def test_fsdp2_shares_weights_gradients_and_moments() -> None:
    config = make_config()
    model = build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0)
    whole, shared = (count_memory(config, model, parallel=kind, num_gpus=4, rows=ROWS // 2) for kind in KINDS)
    for part in ("weights", "gradients", "optimizer"):
        assert 4 * getattr(shared, part) == pytest.approx(getattr(whole, part), rel=1e-3)
    assert shared.activations == whole.activations


def test_gradients_take_the_room_of_activations_unless_they_are_accumulated_or_lie_in_buckets() -> None:
    config = make_config()
    model = build_config(config.model, text_vocab_size=VOCABULARY, eos_token_id=0)
    accumulated, at_once = (
        {kind: count_memory(config, model, parallel=kind, num_gpus=4, rows=rows).gradients for kind in KINDS}
        for rows in (ROWS // 2, ROWS)
    )
    assert at_once["ddp"] == accumulated["ddp"]
    assert at_once["fsdp2"] < accumulated["fsdp2"]


def test_time_halves_with_twice_the_gpus_and_grows_with_recomputation() -> None:
    config = make_config()
    one, two = (plan_run(config, num_gpus=count, gpu="h100", text_vocab_size=VOCABULARY) for count in (1, 2))
    assert one.hours == pytest.approx(2 * two.hours)
    assert one.gpu_hours == pytest.approx(two.gpu_hours)
    assert one.dollars == pytest.approx(two.dollars)
    assert one.text_tokens == config.total_steps * 8 * config.text_tokens_per_block
    training = config.training.model_copy(update={"gradient_checkpointing": True})
    slower = plan_run(
        config.model_copy(update={"training": training}), num_gpus=1, gpu="h100", text_vocab_size=VOCABULARY
    )
    assert slower.hours == pytest.approx(4 / 3 * one.hours)


def test_a_plain_model_costs_nothing_more_than_itself() -> None:
    plain = make_config(meta_attention_layers="none", ratio=0.0)
    cost = plan_run(plain, num_gpus=1, gpu="h100", text_vocab_size=VOCABULARY)
    assert cost.flops_per_text_token == cost.plain_flops_per_text_token


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    shape = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = PretrainConfig.model_validate({"model": shape})
    cost = plan_run(config, num_gpus=1, gpu="a100-80gb", text_vocab_size=50_257)
    model = build_config(config.model, text_vocab_size=50_257, eos_token_id=0)
    largest = cost.largest_micro_batch["ddp"]
    following = min(rows for rows in range(largest + 1, 481) if 480 % rows == 0)
    fits, does_not = (
        count_memory(config, model, parallel="ddp", num_gpus=1, rows=rows).total for rows in (largest, following)
    )
    assert fits <= 0.9 * 80e9 < does_not


def test_the_verb_takes_tokens_and_overrides() -> None:
    flags = ("--gpus", "4", "--gpu", "h200", "--tokens", "1e9", "--model.num_hidden_layers", "6", "--json")
    cost = json.loads(metatokens("plan", "paper/meta-rope-152m", *flags).stdout)
    assert 1e9 <= cost["text_tokens"] < 1.001e9
    assert cost["memory_ddp"]["weights"] == 4 * cost["parameters"]
    assert "days" in metatokens("plan", "paper/meta-rope-152m").stdout


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("paper/gpt2-124m", "--gpu", "h10"), "found h10; did you mean 'h100'?"),
        (("paper/gpt2-124m", "--gpus", "7"), "found 480"),
        (("paper/landmark",), "found attention landmark"),
        (("paper/gpt2-124m", "--utilisation", "0"), "0 is not above 0 and at most 1"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(arguments: tuple[str, ...], found: str) -> None:
    assert found in error_line("plan", *arguments, code=2)
