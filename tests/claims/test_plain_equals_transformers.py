"""The model without meta-attention is GPT-2 (section 4.1, the baseline), as transformers computes it."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from metatokens.model import MetaTokenForCausalLM
from tiny_models import assert_close, attention_mask_of, randomize, tiny_model, tokens

BATCHES = {"full": ("xxxxxxxxxxxx", "xxxxxxxxxxxx"), "right_padded": ("xxxxxxxxxxxx", "xxxxxxx.....")}


def copy_linear(target: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    with torch.no_grad():
        target.weight.copy_(weight)
        target.bias.copy_(bias)


def load_gpt2(model: MetaTokenForCausalLM, gpt2: GPT2LMHeadModel) -> None:
    """Copy all weights; GPT-2's Conv1D holds them transposed and q, k, v side by side."""
    source = gpt2.transformer
    model.model.embed_tokens.weight.data.copy_(source.wte.weight)
    model.model.embed_positions.weight.data.copy_(source.wpe.weight)
    copy_linear(model.model.norm, source.ln_f.weight, source.ln_f.bias)
    for layer, block in zip(model.model.layers, source.h, strict=True):
        copy_linear(layer.input_layernorm, block.ln_1.weight, block.ln_1.bias)
        copy_linear(layer.post_attention_layernorm, block.ln_2.weight, block.ln_2.bias)
        weights = block.attn.c_attn.weight.T.chunk(3)
        biases = block.attn.c_attn.bias.chunk(3)
        attention = layer.self_attn
        for target, weight, bias in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), weights, biases, strict=True
        ):
            copy_linear(target, weight, bias)
        copy_linear(attention.o_proj, block.attn.c_proj.weight.T, block.attn.c_proj.bias)
        copy_linear(layer.mlp.up_proj, block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
        copy_linear(layer.mlp.down_proj, block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)


def load_neox(model: MetaTokenForCausalLM, neox: GPTNeoXForCausalLM) -> None:
    """Copy all weights; GPT-NeoX holds q, k and v of each head side by side."""
    source = neox.gpt_neox
    model.model.embed_tokens.weight.data.copy_(source.embed_in.weight)
    model.lm_head.weight.data.copy_(neox.get_output_embeddings().weight)
    copy_linear(model.model.norm, source.final_layer_norm.weight, source.final_layer_norm.bias)
    for layer, block in zip(model.model.layers, source.layers, strict=True):
        copy_linear(layer.input_layernorm, block.input_layernorm.weight, block.input_layernorm.bias)
        norm = block.post_attention_layernorm
        copy_linear(layer.post_attention_layernorm, norm.weight, norm.bias)
        attention = layer.self_attn
        fused = block.attention.query_key_value
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        weights = fused.weight.view(heads, 3, -1, width).transpose(0, 1).reshape(3, width, width)
        biases = fused.bias.view(heads, 3, -1).transpose(0, 1).reshape(3, width)
        for target, weight, bias in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), weights, biases, strict=True
        ):
            copy_linear(target, weight, bias)
        copy_linear(attention.o_proj, block.attention.dense.weight, block.attention.dense.bias)
        copy_linear(layer.mlp.up_proj, block.mlp.dense_h_to_4h.weight, block.mlp.dense_h_to_4h.bias)
        copy_linear(layer.mlp.down_proj, block.mlp.dense_4h_to_h.weight, block.mlp.dense_4h_to_h.bias)


@pytest.mark.parametrize("batch", BATCHES)
def test_plain_model_with_learned_positions_equals_transformers_gpt2(batch: str) -> None:
    model = tiny_model(position_encoding="learned", meta_attention_layers="none", seed=5)
    config = model.config
    gpt2 = randomize(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.max_position_embeddings,
                n_embd=config.hidden_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_inner=config.intermediate_size,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    ).eval()
    load_gpt2(model, gpt2.double())
    ids = tokens(*BATCHES[batch])
    mask = attention_mask_of(ids)
    with torch.no_grad():
        actual, expected = model(ids, attention_mask=mask).logits, gpt2(ids, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], 1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_plain_model_with_rope_equals_transformers_gpt_neox(batch: str) -> None:
    model = tiny_model(meta_attention_layers="none", tie_word_embeddings=False, seed=5)
    config = model.config
    neox = randomize(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_position_embeddings,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
                use_parallel_residual=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    ).eval()
    load_neox(model, neox.double())
    ids = tokens(*BATCHES[batch])
    mask = attention_mask_of(ids)
    with torch.no_grad():
        actual, expected = model(ids, attention_mask=mask).logits, neox(ids, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], 1e-5)
