"""Attention mass by distance equals what the model's own eager weights add up to."""

import torch

from lens_models import attention_call
from metatokens.analysis.attention.distance import distance_profile
from metatokens.lens import Lens
from metatokens.lens.activations import AttentionCall
from tiny_models import META, tiny_model, tokens


def test_distance_profile_adds_up_and_finds_a_previous_token_head() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 33, 16, generator=generator) for _ in range(2))
    is_meta = torch.rand(2, 33, generator=generator) < 0.3
    profile = distance_profile(attention_call(query, key, scaling=0.25), is_meta=is_meta)
    assert torch.allclose(profile.sum((0, 3)), torch.ones(2, 2, dtype=torch.float64))
    positions = torch.eye(33)[None, None] * 50
    previous = torch.roll(positions, -1, dims=-2)
    found = distance_profile(attention_call(positions, previous), is_meta=torch.zeros(1, 33, dtype=torch.bool))
    assert found[0, 0, 0, 1] > 0.95  # distance 1; the first token has only itself


def test_rows_that_see_nothing_do_not_count() -> None:
    query, key = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[:, :, :, :3] = False
    profile = distance_profile(attention_call(query, key, scaling=0.25, mask=mask), is_meta=torch.arange(9)[None] == 4)
    assert torch.allclose(profile.sum((0, 3)), torch.ones(1, 2, dtype=torch.float64))


def test_profiles_of_a_model_are_those_of_its_own_weights() -> None:
    model = tiny_model(attn_implementation="eager")
    ids = tokens("xx_xx_xxx_xxxxxxx", "xxxx_xxxxxx_xxxxx")
    is_meta, calls = ids == META, list[AttentionCall]()
    lens = Lens(model)
    with lens.observe(lambda call: calls.append(call) if call.branch == "attn" else None):
        output = lens(ids, output_attentions=True, use_cache=False)
    distance = torch.arange(17)[:, None] - torch.arange(17)
    rows = torch.tensor([3, 8, 16])
    for call, attentions in zip(calls, output.attentions, strict=True):
        weights = attentions.double()
        profile = distance_profile(call, is_meta=is_meta)
        on_meta = (weights * is_meta[:, None, None]).sum((2, 3)) / 17
        torch.testing.assert_close(profile[1].sum(-1), on_meta, rtol=1e-4, atol=1e-5)
        mass = (weights * ((distance == 2) | (distance == 3))).sum((2, 3)) / 17
        torch.testing.assert_close(profile[:, :, :, 2].sum(0), mass, rtol=1e-4, atol=1e-5)
        sampled = distance_profile(call, is_meta=is_meta, rows=rows)
        mass = (weights * (distance == 1))[:, :, rows].sum((2, 3)) / 3
        torch.testing.assert_close(sampled[:, :, :, 1].sum(0), mass, rtol=1e-4, atol=1e-5)
