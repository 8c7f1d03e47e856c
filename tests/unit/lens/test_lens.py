"""The lens reads what the model computes and leaves nothing behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPTNeoForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from baseline_models import BASELINES, baseline_model
from lens_models import META, MODELS, assert_untouched, build, gpt2, sample_ids
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import NoPositionEdges, intervene
from metatokens.lens import Lens, edits
from metatokens.lens.lens import AttentionCall
from metatokens.model.attention import eager_attention
from metatokens.model.compatibility import CACHE_NAME
from tiny_models import assert_close, tiny_model, tokens


@pytest.fixture(params=MODELS, name="model")
def fixture_model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_logits_keep_their_bits_while_everything_is_read(model: Any) -> None:
    ids = sample_ids()
    with torch.no_grad():
        plain = model(ids).logits
    lens = Lens(model)
    with lens.capture(["*"]) as captured:
        read = lens(ids).logits
    assert torch.equal(plain, read)
    assert set(captured) == set(lens.names)
    assert torch.equal(captured["unembed.hook_logits"], plain)
    assert_untouched(model)


def test_every_tap_fires_once_a_forward_pass(model: Any) -> None:
    lens, fired = Lens(model), []

    def note(name: str) -> edits.Edit:
        return edits.Edit(name, lambda value, columns: (fired.append((name, tuple(columns.shape))), value)[1])

    with lens.edit(*(note(name) for name in lens.names)), lens.capture(["*"]) as captured:
        lens(sample_ids())
    assert sorted(name for name, _ in fired) == sorted(lens.names)
    if not isinstance(model, GPTNeoForCausalLM):
        assert [name for name, _ in fired] == list(lens.names)
    assert all(shape == tuple(captured[name].shape[:2]) for name, shape in fired)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_function_runs_twice_in_every_block(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lens that saw one of the two attentions twice, or ran one itself, would pass for one that sees both."""
    model, calls = build(attn_implementation=implementation), []
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        implementation,
        lambda module, *a, **k: (calls.append(module), attend(module, *a, **k))[1],
    )
    lens = Lens(model)
    with lens.capture(["*"]), lens.observe([].append):
        lens(sample_ids())
    layers = model.model.layers
    assert calls == [module for layer in layers for module in (layer.self_attn, layer.meta_attn)]


def test_parts_add_up_to_the_residual_stream(model: Any) -> None:
    lens = Lens(model)
    with lens.capture(["embed.*", "*_out", "*.hook_resid_*"]) as captured:
        lens(sample_ids())
    total = post = captured["embed.hook_embed"]
    for layer, site in enumerate(lens.layout.blocks):
        assert torch.equal(captured[f"blocks.{layer}.hook_resid_pre"], post)
        for attention in site.attentions:
            name = "hook_attn_out" if attention.branch == "attn" else "hook_meta_out"
            total = total + captured[f"blocks.{layer}.{name}"]
        torch.testing.assert_close(total, captured[f"blocks.{layer}.hook_resid_mid"], rtol=0, atol=1e-5)
        total = total + captured[f"blocks.{layer}.hook_mlp_out"]
        post = captured[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(total, post, rtol=0, atol=1e-5)


def test_meta_output_is_zero_off_the_meta_tokens() -> None:
    lens, ids = Lens(build()), sample_ids()
    with lens.capture(["*.hook_meta_out"]) as captured:
        lens(ids)
    for value in (captured[name] for name in captured):
        assert not value[ids != META].any()
        assert value[ids == META].any(-1).all()


@pytest.mark.parametrize("name", ["rope", "learned", "eager", "gpt2", "gpt-neo"])
def test_scores_of_the_captured_queries_and_keys_are_the_models_own(name: str) -> None:
    model, ids = MODELS[name](), sample_ids()
    lens = Lens(model)
    with lens.capture(["*.hook_rot_q", "*.hook_rot_k", "*.hook_v", "*.hook_z"]) as captured:
        lens(ids)
    for site in (site for block in lens.layout.blocks for site in block.attentions):
        query, key, value, z = (
            captured[f"{site.prefix}.{tap}"].transpose(1, 2) for tap in ("hook_rot_q", "hook_rot_k", "hook_v", "hook_z")
        )
        scores = query @ key.transpose(-1, -2) * site.scaling
        distance = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
        seen = distance >= 0
        if getattr(site.module, "attention_type", None) == "local":
            seen &= distance < 4
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        kept = torch.ones(z.shape[0], z.shape[2], dtype=torch.bool)
        if site.branch == "meta_attn":
            assert captured.meta_columns is not None
            kept = captured.meta_columns >= 0
        torch.testing.assert_close(z.transpose(1, 2)[kept], expected.transpose(1, 2)[kept], rtol=1e-4, atol=1e-5)


def test_selected_tokens_are_packed_in_the_order_of_the_index() -> None:
    lens, ids = Lens(build()), sample_ids()
    names = ["blocks.1.hook_resid_post", "blocks.1.meta_attn.hook_z", "blocks.1.meta_attn.hook_v"]
    with lens.capture(names) as whole:
        lens(ids)
    with lens.capture(names, at=ids == META, dtype=torch.float32) as packed:
        lens(ids)
    rows, columns = packed.index_of(names[0]).T
    assert packed[names[0]].dtype == torch.float32
    assert torch.equal(packed[names[0]], whole[names[0]][rows, columns].float())
    assert whole.meta_columns is not None
    for name in names[1:]:
        assert torch.equal(packed[name], whole[name][whole.meta_columns >= 0].float())


def test_nothing_is_left_behind_when_the_model_raises(model: Any) -> None:
    lens, ids = Lens(model), sample_ids()
    plain = lens(ids).logits

    def fail(old: Tensor, columns: Tensor) -> Tensor:
        raise RuntimeError(f"on purpose, at {old.shape} and {columns.shape}")

    changes = [edits.scale("*.hook_z", 0.0), edits.cut_edges(None, query=ids == META, key=ids == META)]
    changes.append(edits.Edit("blocks.1.hook_mlp_out", fail))
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        lens.capture(["*"]),
        lens.edit(*changes),
        lens.observe([].append),
    ):
        lens(ids)
    assert_untouched(model)
    assert torch.equal(lens(ids).logits, plain)
    with pytest.raises(ValueError, match="input_ids"), lens.capture(["*"]):
        lens()
    assert_untouched(model)


def test_hooks_are_hung_on_what_is_asked_for_alone() -> None:
    model = build()
    lens, block = Lens(model), model.model.layers[1]

    def hooked() -> set[nn.Module]:
        return {module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks}

    with lens.capture(["blocks.1.hook_resid_post"]):
        assert hooked() == {model, block}
    with lens.capture(["blocks.1.attn.hook_rot_q"]):
        assert hooked() == {model, block.self_attn}
    with lens.capture(["blocks.1.meta_attn.hook_v"]):
        assert hooked() == {model, block.meta_attn, *(getattr(block.meta_attn, f"{x}_proj") for x in "qkv")}
    cut = edits.cut_edges([1], query=sample_ids() == META, key=sample_ids() == META)
    with lens.edit(cut), lens.edit(edits.scale("blocks.1.hook_resid_mid", 2.0)):
        assert hooked() == {model, block, block.self_attn, block.mlp, block.post_attention_layernorm}
    with lens.edit():
        assert hooked() == set()


def test_two_lenses_on_a_model_do_not_disturb_each_other() -> None:
    model, ids = build(), sample_ids()
    one, other, name = Lens(model), Lens(model), "blocks.1.attn.hook_rot_q"
    with one.capture([name]) as plain:
        one(ids)
    with one.edit(edits.scale(name, 2.0)), other.capture([name]) as seen:
        other(ids)
    assert torch.equal(seen[name], plain[name] * 2)
    assert_untouched(model)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_read_as_they_are(name: str) -> None:
    model, ids = baseline_model(name), tokens("xx_xx_xxx_x", "_xxx_xxxx_x")
    lens = Lens(model)
    plain = lens(ids).logits
    with lens.capture(["*"]) as captured, lens.observe([].append):
        assert torch.equal(lens(ids).logits, plain)
    assert set(captured) == set(lens.names)


def test_a_long_text_in_memory_mode_is_read_edge_by_edge() -> None:
    # so long that the model attends in chunks, whose mask is no tensor
    model = tiny_model(memory={"anchors": "meta", "window": 8}, max_position_embeddings=200)
    ids, calls = tokens("xxxxxxxx_" * 20), []
    lens = Lens(model)
    plain = lens(ids).logits
    with lens.observe(calls.append):
        observed = lens(ids).logits
    assert_close(observed, plain, 1e-10)
    masks = [call.mask for call in calls if call.branch == "attn"]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 180, 180)] * 2
    assert masks[0][0, 0, 100, 80]  # a meta-token, which stays
    assert not masks[0][0, 0, 100, 82]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.compiler.set_stance("force_eager")  # its kernels take half a minute to compile, and a lens sees none of them
def test_flex_attention_is_read_and_its_edges_are_not_cut() -> None:
    model, ids = build(attn_implementation="flex_attention"), sample_ids()
    lens = Lens(model)
    plain = lens(ids).logits
    with lens.capture(["*"]) as captured:
        assert torch.equal(lens(ids).logits, plain)
    assert set(captured) == set(lens.names)


def test_index_tells_row_and_column_of_what_is_packed() -> None:
    lens, ids = Lens(build()), sample_ids()
    at = torch.zeros(1, 12, dtype=torch.bool)
    at[:, [1, 5, 6]] = True
    tokens_of, of_meta = "blocks.1.hook_resid_post", "blocks.1.meta_attn.hook_z"
    with lens.capture([tokens_of, of_meta], at=at) as captured:
        lens(ids)
    assert captured.index_of(tokens_of).tolist() == [[0, 1], [0, 5], [0, 6], [1, 1], [1, 5], [1, 6]]
    assert len(captured[tokens_of]) == 6
    assert captured.index_of(of_meta).tolist() == [[0, 5], [1, 1]]
    assert len(captured[of_meta]) == 2
    with lens.capture([tokens_of]) as captured:
        lens(ids)
    with pytest.raises(ValueError, match="a capture without `at`"):
        captured.index_of(tokens_of)


@pytest.mark.parametrize("name", ["rope", "random", "all", "gpt2", "gpt-neo"])
def test_a_cached_step_is_read_at_the_columns_of_the_whole_sequence(name: str) -> None:
    model, ids = MODELS[name](), sample_ids()
    lens, at = Lens(model), torch.zeros(1, 12, dtype=torch.bool)
    at[:, [3, 7, 10]] = True
    with lens.capture(["*"], at=at) as whole:
        lens(ids)
    cache = DynamicCache(config=model.config)
    lens(ids[:, :6], use_cache=True, **{CACHE_NAME: cache})
    with lens.capture(["*"], at=at) as step:
        lens(ids[:, 6:], use_cache=True, **{CACHE_NAME: cache})
    for tap in step:
        index = step.index_of(tap)
        assert bool((index[:, 1] >= 6).all())
        rows = [whole.index_of(tap).tolist().index(place) for place in index.tolist()]
        torch.testing.assert_close(step[tap], whole[tap][rows], rtol=1e-3, atol=1e-4)
    assert step.index_of("unembed.hook_logits").tolist() == [[0, 7], [0, 10], [1, 7], [1, 10]]


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 11])])
def test_logits_of_some_tokens_are_read_and_changed_at_their_columns(kept: Any) -> None:
    lens, ids = Lens(build()), sample_ids()
    last = torch.arange(12)[None] == 11
    with lens.edit(edits.scale("unembed.hook_logits", 2.0, at=last)):
        with lens.capture(["unembed.hook_logits"], at=last) as captured:
            some = lens(ids, logits_to_keep=kept).logits
        whole = lens(ids).logits
    torch.testing.assert_close(captured["unembed.hook_logits"], whole[:, -1])
    torch.testing.assert_close(some[:, -1], whole[:, -1])


def weights_of(call: AttentionCall) -> Tensor:
    """Return the attention weights that the observed queries, keys and mask give, (B, H, T, T)."""
    scores = call.query_BHTD @ call.key_BHTD.transpose(-1, -2) * call.scaling
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    elif call.mask is not None:
        scores = scores + call.mask
    hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize("name", [*MODELS])
def test_observed_queries_keys_and_masks_give_the_weights_of_the_eager_backend(name: str) -> None:
    model, ids = MODELS[name](), sample_ids(tokens=14)
    lens, calls = Lens(model), []
    padding = torch.ones_like(ids)
    padding[1, :2] = 0
    with lens.observe(calls.append):
        lens(ids, attention_mask=padding)
    if not isinstance(model, GPTNeoForCausalLM):
        model.set_attn_implementation("eager")
    ours = {} if name.startswith("gpt") else {"output_meta_attentions": True}
    output = lens(ids, attention_mask=padding, output_attentions=True, **ours)
    expected = {"attn": list(output.attentions), "meta_attn": list(getattr(output, "meta_attentions", None) or ())}
    for call in calls:
        weights, eager = weights_of(call), expected[call.branch].pop(0)
        real = call.columns >= 0
        if call.branch == "attn" or name == "all":
            real = real & (padding == 1)
        kept = real[:, None, :, None].expand_as(weights)
        torch.testing.assert_close(weights[kept], eager[kept], rtol=1e-4, atol=1e-5)
    assert not any(expected.values())


def test_observed_scores_are_those_of_an_intervention() -> None:
    """Keys cached for unrotated edges are wider than the queries that use them."""
    model, ids = build(attn_implementation="eager"), sample_ids().clamp(max=META - 1)
    lens, calls = Lens(model), []
    with intervene(model, [NoPositionEdges()]), lens.observe(calls.append):
        output = lens(ids, use_cache=True, output_attentions=True)
    for call, weights in zip(calls, output.attentions, strict=True):
        torch.testing.assert_close(weights_of(call), weights, rtol=1e-4, atol=1e-5)
    ids[:, [3, 5]] = META
    calls.clear()
    with intervene(model, [NoPositionEdges()]), lens.observe(calls.append):
        output = lens(ids, output_attentions=True)
    torch.testing.assert_close(weights_of(calls[4]), output.attentions[2], rtol=1e-4, atol=1e-5)


def test_half_precision_models_keep_their_bits() -> None:
    lens, ids = Lens(build().to(torch.bfloat16)), sample_ids()
    plain = lens(ids).logits
    with lens.capture(["*"], dtype=torch.float32) as captured:
        assert torch.equal(lens(ids).logits, plain)
    assert {value.dtype for value in captured.values()} == {torch.float32}
    with lens.edit(edits.cut_edges(None, query=ids == META, key=ids == 3), edits.scale("*.hook_z", 1.0)):
        assert lens(ids).logits.dtype == torch.bfloat16


def test_observers_see_every_attention_with_its_mask() -> None:
    lens, ids, calls = Lens(build()), sample_ids(), []
    cut = edits.cut_edges([1], query=ids != META, key=ids == META)
    with lens.edit(cut), lens.observe(calls.append):
        lens(ids)
    assert [(call.layer, call.branch) for call in calls] == [(i, b) for i in range(3) for b in ("attn", "meta_attn")]
    assert calls[0].mask is None
    assert not calls[2].mask[0, 0, 4, 2]
    assert calls[1].columns.tolist() == [[2, 5, 9], [1, 7, -1]]
    cache = DynamicCache(config=lens.model.config)
    lens(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="starts without a cache, not behind 12 tokens"), lens.observe(calls.append):
        lens(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_lens_knows_the_meta_tokens_of_its_model_and_what_predicts_behind_them() -> None:
    ids = sample_ids()
    lens = Lens(build(loss_policy="retarget"))
    assert (lens.meta_token_id, lens.loss_policy) == (META, "retarget")
    assert torch.equal(lens.is_meta(ids), ids == META)
    assert torch.equal(lens.is_meta(ids[0]), ids[0] == META)
    plain = Lens(gpt2())
    assert (plain.meta_token_id, plain.loss_policy) == (None, "skip")
    assert not plain.is_meta(ids).any()


def test_a_run_makes_neither_a_cache_nor_logits_that_nobody_reads() -> None:
    lens, ids = Lens(build()), sample_ids()
    output = lens.run(ids)
    assert CACHE_NAME not in output
    torch.testing.assert_close(output.logits, lens(ids).logits[:, -1:])
    assert lens.run(ids, logits_to_keep=3).logits.shape[1] == 3


def test_a_misused_lens_says_in_one_sentence_what_is_wrong() -> None:
    model, ids = build(meta_attention_layers=[1]), sample_ids()
    lens = Lens(model)
    at = ids == META
    with (
        pytest.raises(ValueError, match=r"did you mean 'blocks\.0\.hook_resid_mid'"),
        lens.capture(["blocks.0.resid_mid"]),
    ):
        pass
    with lens.capture(["*.hook_resid_post"]):
        lens(ids)
        with pytest.raises(ValueError, match="a capture keeps one forward pass"):
            lens(ids)
    cut = edits.cut_edges([0, 1, 2], query=at, key=at, branch="meta_attn")
    with pytest.raises(ValueError, match=r"can be cut in the layers \[1\], not in \[0, 2\]"), lens.edit(cut):
        pass
    with pytest.raises(ValueError, match="a forward pass of the whole model"), lens.capture(["*.hook_z"]):
        model.model(ids)
    with (
        pytest.raises(ValueError, match=r"positions \(4, 12\) are neither for all rows nor for each of 2"),
        lens.capture(["*.hook_resid_pre"], at=at.repeat(2, 1)),
    ):
        lens(ids)
    with (
        pytest.raises(ValueError, match=r"a mask .* of bool, .* not \(2, 12\) int64"),
        lens.capture(["*.hook_z"], at=ids),
    ):
        pass
    for part in (model, model.model.layers[2].mlp):
        part.train()
        with pytest.raises(ValueError, match="in training mode"):
            lens(ids)
        with pytest.raises(ValueError, match=r"call model\.eval"):
            Lens(model)
        model.eval()


def test_a_tap_that_did_not_fire_has_no_key() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_meta_out"
    with lens.capture([name]) as captured:
        lens(ids.clamp(max=META - 1))
    assert name not in captured
    assert captured.get(name) is None
    with pytest.raises(KeyError, match="has not fired: no forward pass yet, or one without meta-tokens"):
        captured[name]
    with pytest.raises(KeyError, match="not among the captured names"):
        captured["blocks.0.hook_meta_out"]


def test_a_model_that_the_lens_cannot_read_is_refused_in_one_line() -> None:
    ids = sample_ids()
    model = build(attn_implementation="flex_attention")
    cut = edits.cut_edges([0], query=ids == META, key=ids == META)
    with pytest.raises(UsageError, match="expected eager or sdpa"), Lens(model).edit(cut):
        model(ids)
    lens = Lens(build(position_encoding="dape_alibi", attn_implementation="sdpa"))
    with pytest.raises(UsageError, match="found dape_alibi"), lens.observe(print):
        lens(ids)
    with pytest.raises(UsageError, match="GPT-2 with cross-attention"):
        Lens(gpt2(add_cross_attention=True))
    with pytest.raises(UsageError, match="found Linear"):
        Lens(nn.Linear(1, 1).eval())  # type: ignore[arg-type]
