"""A saved model gives the same bits wherever it is loaded: here, and through the Auto classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM, MetaTokenModel
from metatokens.model.export import save_model
from tiny_models import MAX_LENGTH, tiny_model, tokens

ROPE = {"rope_theta": 10_000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"rope_parameters": {**ROPE, "rope_type": "default"}},
    "yarn": {
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": MAX_LENGTH // 4,
        },
    },
    "linear": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}},
    "learned": {"position_encoding": "learned"},
    "alibi": {"position_encoding": "alibi"},
    "t5": {"position_encoding": "t5"},
    "fourier": {"position_encoding": "fourier"},
    "dape": {"position_encoding": "dape_kerple"},
    "transformer_xl": {"position_encoding": "transformer_xl"},
    "none": {"position_encoding": "none"},
    "random_positions": {"position_encoding": "learned", "position_range": 150},
    "rnope": {"position_layers": [1]},
    "memory": {"memory": {"anchors": "meta", "window": 2, "num_sinks": 1}},
    "untied": {"tie_word_embeddings": False},
    "cross": {"meta_attention_over": "cross"},
    "thoughts": {"thought_length": 1},
    "some_layers": {"meta_attention_layers": [1]},
}
IDS = tokens("x_xx_x__xxxxx", "xxxxxxx_xxxx_")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_loaded_model_gives_the_bits_of_the_saved_one(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant], dtype=torch.float32)
    save_model(model, tmp_path)
    loaded = MetaTokenForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("variant", ["rope", "yarn", "dynamic", "learned"])
@torch.no_grad()
def test_auto_classes_load_the_bits_of_the_saved_model(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**VARIANTS[variant], dtype=torch.float32)
    save_model(model, tmp_path)
    causal, decoder = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(causal) is MetaTokenForCausalLM
    assert type(decoder) is MetaTokenModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is MetaTokenConfig
    assert torch.equal(causal(IDS).logits, model(IDS).logits)
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@torch.no_grad()
def test_model_loaded_as_bfloat16_gives_the_same_bits_when_saved_and_loaded_again(tmp_path: Path) -> None:
    save_model(tiny_model(dtype=torch.float32), tmp_path / "float32")
    model = MetaTokenForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    save_model(model, tmp_path / "bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_model_cast_to_bfloat16_gives_the_bits_of_the_same_model_loaded_as_bfloat16(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    save_model(model, tmp_path)
    loaded = MetaTokenForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded(IDS).logits, model.to(torch.bfloat16)(IDS).logits)
