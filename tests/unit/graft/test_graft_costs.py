"""What a step of a graft takes: operations beside those that torch counts, and the memory of the preset for 8B."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from grafted_models import EIGHT_BILLION, GROUPED, ids
from metatokens.config.grafting import GraftFields, GraftRunConfig, Objectives
from metatokens.config.loading import load_preset
from metatokens.config.schema import DataConfig
from metatokens.graft import graft
from metatokens.graft.costs import step_flops, step_memory
from metatokens.graft.student import Student

LENGTH, SAMPLED = 96, 24


@pytest.mark.parametrize("weights", [{"language_model": 0}, {"distillation": 0}, {}])
def test_operations_are_those_that_torch_counts(weights: dict[str, float]) -> None:
    shape = {**GROUPED, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    config = GraftRunConfig(
        graft=GraftFields(window=8, every=8, lora_rank=1),
        data=DataConfig(block_size=LENGTH),
        sampled_positions=SAMPLED,
        objectives=Objectives(**weights),
    )
    student = Student(graft(model, config.graft.build()), config.objectives, {}).train()
    text = ids(length=LENGTH)
    with FlopCounterMode(display=False) as counter:
        student(text, text, torch.arange(SAMPLED)[None]).loss.backward()
    # torch counts attention over all pairs, and the change of low rank too
    assert step_flops(model, config) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_operations_of_meta_attention_are_those_that_torch_counts_more_with_it() -> None:
    shape, text = {**GROUPED, "hidden_size": 128, "intermediate_size": 256}, ids(length=LENGTH)
    counted, computed = [], []
    for meta_attention in (False, True):
        config = GraftRunConfig(
            graft=GraftFields(window=8, every=8, meta_attention=meta_attention),
            data=DataConfig(block_size=LENGTH),
            sampled_positions=SAMPLED,
        )
        model = graft(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), config.graft.build())
        student = Student(model, config.objectives, {}).train()
        with FlopCounterMode(display=False) as counter:
            student(text, text, torch.arange(SAMPLED)[None]).loss.backward()
        counted.append(counter.get_total_flops())
        computed.append(step_flops(model, config))
    # torch counts all pairs of anchors
    assert computed[1] - computed[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.parametrize("meta_attention", [False, True])
def test_the_preset_for_8b_fits_a_gpu_of_80_gb(meta_attention: bool) -> None:
    config = load_preset("graft/8b", ["--graft.meta_attention", str(meta_attention)], schema=GraftRunConfig)
    for changes in ({}, {"intermediate_size": 11_008, "num_key_value_heads": 32, "vocab_size": 32_000}):
        with torch.device("meta"):
            shape = transformers.LlamaConfig(**{**EIGHT_BILLION, **changes})
            model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        memory = step_memory(graft(model, config.graft.build()), config)
        assert memory["weights"] == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
        assert min(memory.values()) > 0
        assert sum(memory.values()) < 0.9 * 80e9
