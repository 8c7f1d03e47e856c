"""A model spread over two devices; the second is "meta", which computes shapes and refuses tensors from elsewhere."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metatokens.baselines import LandmarkConfig, LandmarkForCausalLM
from metatokens.baselines.landmark import Landmarks
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.masks import TokenLayout
from metatokens.model.meta_attention import pack_meta_tokens
from tiny_models import ENCODINGS, META, attention_mask_of, tiny_config, tiny_model, tokens

IDS = tokens("x_xx__x", "xx_x..x")


def last_block_elsewhere(model: MetaTokenForCausalLM) -> MetaTokenForCausalLM:
    for part in (model.model.layers[-1], model.model.norm, model.lm_head):
        part.to("meta")
    add_hook_to_module(model.model.layers[-1], AlignDevicesHook(execution_device="meta"))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        *({"position_encoding": encoding} for encoding in ENCODINGS),
        {"attn_implementation": "eager"},
        {"meta_attention_over": "all"},
        {"meta_attention_over": "random"},
        {"meta_attention_over": "cross"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
@torch.no_grad()
def test_a_block_on_another_device_gets_all_its_inputs_there(changes: dict[str, Any]) -> None:
    model = last_block_elsewhere(tiny_model(tie_word_embeddings=False, **changes))
    logits = model(IDS, attention_mask=attention_mask_of(IDS), use_cache=False).logits
    assert logits.device.type == "meta"
    assert logits.shape == (*IDS.shape, model.config.vocab_size)


def test_every_tensor_of_a_pack_moves_with_it() -> None:
    config = tiny_config(position_encoding="rope", attn_implementation="eager")
    model = tiny_model(attn_implementation="eager").model
    hidden, positions = model.embed_tokens(IDS), torch.arange(IDS.shape[1])[None]
    pack = pack_meta_tokens(
        config,
        hidden,
        meta_token_mask=IDS == META,
        meta_indices=None,
        rotary=model.rotary_emb(hidden, positions),
        layout=TokenLayout(positions, attention_mask=None, documents=None, bias=None),
        past_key_values=None,
        always=False,
    )
    assert pack is not None
    moved = send_to_device(pack, "meta")
    assert type(moved) is type(pack)
    assert isinstance(moved.mask, Tensor)
    leaves = tree_leaves(moved)
    assert len(leaves) == len(pack) + 1  # cos and sin
    assert {leaf.device.type for leaf in leaves} == {"meta"}


@pytest.mark.parametrize(("num_best_blocks", "num_tensors"), [(None, 6), (1, 8)])
@torch.no_grad()
def test_every_tensor_of_the_landmarks_moves_with_them(num_best_blocks: int | None, num_tensors: int) -> None:
    fields = tiny_config(position_encoding="alibi").to_diff_dict()
    model = LandmarkForCausalLM(LandmarkConfig(**fields, num_best_blocks=num_best_blocks)).eval()
    given: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: given.extend(args))
    model(IDS)
    (landmarks,) = (argument for argument in given if isinstance(argument, Landmarks))
    tensors = [leaf for leaf in tree_leaves(send_to_device(landmarks, "meta")) if isinstance(leaf, Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * num_tensors
