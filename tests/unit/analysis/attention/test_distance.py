"""Attention mass by distance equals what the model's own eager weights add up to."""

import torch

from metatokens.analysis.attention.distance import distance_profile, distance_profiles
from metatokens.lens import Lens
from tiny_models import META, attention_mask_of, tiny_model, tokens


def test_distance_profile_adds_up_and_finds_a_previous_token_head() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 33, 16, generator=generator) for _ in range(2))
    is_meta = torch.rand(2, 33, generator=generator) < 0.3
    profile = distance_profile(query, key, scaling=0.25, is_meta=is_meta)
    assert torch.allclose(profile.sum((0, 3)), torch.ones(2, 2, dtype=torch.float64))
    positions = torch.eye(33)[None, None] * 50
    previous = torch.roll(positions, -1, dims=-2)
    found = distance_profile(positions, previous, scaling=1.0, is_meta=torch.zeros(1, 33, dtype=torch.bool))
    assert found[0, 0, 0, 1] > 0.95  # distance 1; the first token has only itself


def test_rows_that_see_nothing_do_not_count() -> None:
    query, key = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[:, :, :, :3] = False
    profile = distance_profile(query, key, scaling=0.25, is_meta=torch.arange(9)[None] == 4, mask=mask)
    assert torch.allclose(profile.sum((0, 3)), torch.ones(1, 2, dtype=torch.float64))


def test_profiles_of_a_model_count_tokens_of_the_sequence_in_both_branches() -> None:
    model = tiny_model(attn_implementation="eager")
    ids = tokens("xx_xx_xxx_xxxxx..", "..xx_xxxxxx_xxxxx")
    is_real = attention_mask_of(ids).bool()
    found = distance_profiles(Lens(model), ids, is_meta=ids == META, attention_mask=is_real.long())
    with torch.no_grad():
        output = model(
            ids, attention_mask=is_real.long(), output_attentions=True, output_meta_attentions=True, use_cache=False
        )
    distance = torch.arange(17)[:, None] - torch.arange(17)
    for layer in range(2):
        profile, weights = found[layer, "attn"], output.attentions[layer].double()
        rows = is_real[:, None, :, None]
        on_meta = (weights * rows * (ids == META)[:, None, None]).sum((2, 3)) / is_real.sum(-1, keepdim=True)
        torch.testing.assert_close(profile[1].sum(-1), on_meta, rtol=1e-4, atol=1e-5)
        near = ((distance == 2) | (distance == 3)) & rows
        mass = (weights * near).sum((2, 3)) / is_real.sum(-1, keepdim=True)
        torch.testing.assert_close(profile[:, :, :, 2].sum(0), mass, rtol=1e-4, atol=1e-5)
        meta_profile, meta_weights = found[layer, "meta_attn"], output.meta_attentions[layer].double()
        assert meta_profile[0].abs().max() == 0
        torch.testing.assert_close(meta_profile.sum((0, 3)), torch.ones(2, 4, dtype=torch.float64))
        # the distances of 2, 5, 9 are 3, 4 and 7; those of 4 and 11 are 7
        expected = [meta_weights[0, :, 1, 0] / 3, (meta_weights[0, :, 2, 0] + meta_weights[0, :, 2, 1]) / 3]
        torch.testing.assert_close(meta_profile[1, 0, :, 2:4], torch.stack(expected, -1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(meta_profile[1, 1, :, 3], meta_weights[1, :, 1, 0] / 2, rtol=1e-4, atol=1e-5)
