"""The lens on grafted decoders and on their plain bases: anchors are columns like others."""

from dataclasses import replace

import pytest
import torch

from grafted_models import CONFIG, FAMILIES, LENGTH, TOLERANCES, ids, largest, make, read, trained
from metatokens.errors import UsageError
from metatokens.graft import graft
from metatokens.graft.grafting import graft_of, switched_off
from metatokens.graft.interventions import without_anchors
from metatokens.lens import Lens, edits
from metatokens.lens.lens import AttentionCall
from metatokens.model.memory import CHUNK

PARALLEL = "gpt_neox"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_grafted", [True, False])
def test_reading_everything_leaves_the_bits_and_the_head_reads_the_text(family: str, is_grafted: bool) -> None:
    model, text = trained(family) if is_grafted else make(family), ids(rows=2)
    with torch.no_grad():
        plain = model(text, use_cache=False).logits
    lens = Lens(model)
    with lens.capture(["*"]) as captured:
        assert torch.equal(lens(text, use_cache=False).logits, plain)
    assert set(captured) == set(lens.names)
    is_meta = lens.is_meta(text)[0]
    normalized = captured["ln_final.hook_normalized"][:, ~is_meta]
    num_anchors = LENGTH // CONFIG.every - CONFIG.num_sinks // CONFIG.every if is_grafted else 0
    assert is_meta.sum() == captured["embed.hook_embed"].shape[1] - LENGTH == num_anchors
    assert largest(model.get_output_embeddings()(normalized) - plain) < 1e-10
    # what a block adds is what its parts add
    pre, post = captured["blocks.1.hook_resid_pre"], captured["blocks.1.hook_resid_post"]
    assert largest(post - pre - captured["blocks.1.hook_attn_out"] - captured["blocks.1.hook_mlp_out"]) < 1e-10
    assert ("blocks.1.hook_resid_mid" in captured) == (family != PARALLEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_edges_to_all_anchors_take_them_from_the_text(family: str) -> None:
    """As without anchors at all, where each is hidden as long as the token before it is seen."""
    model, text = trained(family), ids(rows=2)
    with torch.no_grad(), without_anchors(model):
        expected = model(text, use_cache=False).logits
    lens = Lens(model)
    is_meta = lens.is_meta(text)
    with lens.edit(edits.cut_edges(None, query=~is_meta, key=is_meta)):
        cut = lens(text, use_cache=False).logits
    assert largest(cut - expected) < 1e-10
    assert largest(lens(text, use_cache=False).logits - expected) > 1e-3


@pytest.mark.parametrize("anchors", ["meta", "every"])
@pytest.mark.parametrize("family", ["llama", "gpt2", PARALLEL])
def test_an_edit_at_a_column_is_the_same_in_chunks_and_behind_padding(family: str, anchors: str) -> None:
    model, text = trained(family, replace(CONFIG, anchors=anchors)), ids()
    lens = Lens(model)
    edit = edits.scale("blocks.*.hook_mlp_out", 0.5, at=lens.is_meta(text))
    with torch.no_grad():
        untouched = model(text, use_cache=False).logits
    with lens.edit(edit):
        whole = lens(text, use_cache=False).logits
        chunked = read(model, text, [17, 9, 8, *[1] * 7])
        padded = lens(
            torch.cat([text.new_zeros(1, 3), text], 1),
            attention_mask=torch.tensor([[0] * 3 + [1] * LENGTH]),
            use_cache=False,
        ).logits[:, 3:]
    assert largest(whole - untouched) > 1e-4
    assert largest(chunked - whole) < 1e-10
    assert largest(padded - whole) < 1e-10


def test_projections_at_anchors_have_the_graft_in_them() -> None:
    model, text = trained("llama"), ids()
    lens, added = Lens(model), graft_of(model)
    names = ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_k"]
    with lens.capture(names, at=lens.is_meta(text)) as captured:
        lens(text, use_cache=False)
    block = model.model.layers[1]
    with torch.no_grad():
        entering = block.input_layernorm(captured[names[0]])
        key = "layers-1-self_attn-k_proj"
        change = entering @ added.down[key].T.to(entering.dtype) @ added.up[key].T.to(entering.dtype)
        expected = block.self_attn.k_proj(entering) + change
    assert largest(captured[names[1]].flatten(1) - expected) < 1e-10
    assert largest(change) > 1e-4
    assert captured.index_of(names[1])[:, 1].tolist() == lens.is_meta(text)[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_observed_scores_weigh_the_values_as_the_attention_does(family: str) -> None:
    model, text, weighed = trained(family), ids(rows=2), []
    lens = Lens(model)

    def weigh(call: AttentionCall) -> None:
        (block,) = call.score_blocks()
        weighed.append(block.scores.masked_fill(~block.visible, float("-inf")).softmax(-1))

    with lens.capture(["blocks.*.attn.hook_v", "blocks.*.attn.hook_z"]) as captured, lens.observe(weigh):
        lens(text, use_cache=False)
    for layer, weights in enumerate(weighed):
        values, expected = (captured[f"blocks.{layer}.attn.{tap}"] for tap in ("hook_v", "hook_z"))
        assert largest(torch.einsum("bhqk,bkhd->bqhd", weights, values) - expected) < TOLERANCES.get(family, 1e-10)


def test_with_the_graft_switched_off_the_columns_are_those_of_the_text() -> None:
    model, text = trained("llama"), ids()
    lens = Lens(model)
    with switched_off(model), lens.capture(["embed.hook_embed"]) as captured:
        lens(text, use_cache=False)
    assert captured["embed.hook_embed"].shape[1] == LENGTH


def test_what_a_lens_cannot_see_of_a_graft_is_refused_in_a_line() -> None:
    model = trained("llama")
    lens = Lens(model)
    every = torch.ones(1, 2 * CHUNK, dtype=torch.bool)
    cut = edits.cut_edges(None, query=every, key=every)
    with pytest.raises(UsageError, match="found llama"), lens.observe(print):
        lens(ids())
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a cache, not behind"), lens.edit(cut):
        lens(ids(), past_key_values=cache)
    compact = Lens(graft(make("llama"), replace(CONFIG, positions="compact")))
    with pytest.raises(UsageError, match="a plan of what its queries visit"), compact.edit(cut):
        compact(ids(), use_cache=False)
    assert compact.model.config._attn_implementation == "sdpa"  # the plan is put away
    with pytest.raises(ValueError, match=r"no tap is named .*hook_rot_q"), lens.capture(["blocks.0.attn.hook_rot_q"]):
        pass
