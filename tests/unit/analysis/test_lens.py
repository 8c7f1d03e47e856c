"""The lens reads what the model computes, changes what it is told to, and leaves nothing behind."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from metatokens.analysis import Lens, ops
from metatokens.errors import UsageError
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model import attention as attention_module

VOCABULARY, META = 50, 48
NUM_LAYERS, NUM_HEADS, WIDTH = 3, 2, 16


def build(**changes: Any) -> MetaTokenForCausalLM:
    torch.manual_seed(0)
    config = MetaTokenConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "max_position_embeddings": 64,
            "meta_token_id": META,
            "attn_implementation": "sdpa",
        }
        | changes
    )
    model = MetaTokenForCausalLM(config).eval()
    enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    """Make random weights large enough that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def sample_ids(rows: int = 2, tokens: int = 12) -> Tensor:
    ids = torch.randint(0, META, (rows, tokens), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 5, 9]] = META
    ids[1:, [1, 7]] = META
    return ids


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    enlarge(model)
    return model


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=NUM_HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    model = GPTNeoForCausalLM(config).eval()
    enlarge(model)
    return model


OURS = {
    "rope": {},
    "learned": {"position_encoding": "learned"},
    "alibi": {"position_encoding": "alibi"},
    "none": {"position_encoding": "none"},
    "all": {"meta_attention_over": "all"},
    "random": {"meta_attention_over": "random", "random_ratio": 0.4},
    "one layer": {"meta_attention_layers": [1]},
    "eager": {"attn_implementation": "eager"},
}
MODELS = {name: (lambda changes=changes: build(**changes)) for name, changes in OURS.items()} | {
    "gpt2": gpt2,
    "gpt-neo": gpt_neo,
}


@pytest.fixture(params=MODELS, name="model")
def fixture_model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def assert_untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "project" not in vars(module)


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


def test_every_tap_fires_once_a_forward_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens(model)
    fired: Counter[str] = Counter()
    fire = Lens._fire

    def counting(self: Lens, name: str, value: Tensor, **kwargs: Any) -> Tensor:
        fired[name] += 1
        return fire(self, name, value, **kwargs)

    monkeypatch.setattr(Lens, "_fire", counting)
    with lens.capture(["*"]):
        lens(sample_ids())
    assert set(fired) == set(lens.names)
    assert set(fired.values()) == {1}
    if isinstance(model, MetaTokenForCausalLM):  # without rotation, rotated queries are there before the keys
        assert list(fired) == list(lens.names)


def test_both_attentions_of_every_block_run_under_the_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = attention_module.Attention.attend
    monkeypatch.setattr(
        attention_module.Attention, "attend", lambda self, *a, **k: (calls.append(self), attend(self, *a, **k))[1]
    )
    lens = Lens(build())
    with lens.capture(["blocks.*.hook_resid_post"]):
        lens(sample_ids())
    assert len(set(calls)) == len(calls) == 2 * NUM_LAYERS


def test_parts_add_up_to_the_residual_stream(model: Any) -> None:
    lens = Lens(model)
    with lens.capture(["embed.*", "*_out", "*.hook_resid_*", "*.hook_result"]) as captured:
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
        heads = captured[f"blocks.{layer}.attn.hook_result"].sum(2) + site.attentions[0].output.bias
        torch.testing.assert_close(heads, captured[f"blocks.{layer}.hook_attn_out"], rtol=0, atol=1e-5)


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
    names = ["blocks.1.hook_resid_post", "blocks.1.meta_attn.hook_z", "blocks.1.meta_attn.hook_result"]
    with lens.capture(names) as whole:
        lens(ids)
    with lens.capture(names, at=ids == META, dtype=torch.float64) as packed:
        lens(ids)
    rows, columns = packed.index.T
    assert packed[names[0]].dtype == torch.float64
    assert torch.equal(packed[names[0]].float(), whole[names[0]][rows, columns])
    assert whole.meta_columns is not None
    for name in names[1:]:
        assert torch.equal(packed[name].float(), whole[name][whole.meta_columns >= 0])


def test_no_edit_and_an_activations_own_value_change_nothing(model: Any) -> None:
    lens, ids = Lens(model), sample_ids()
    plain = lens(ids).logits
    with lens.edit():
        assert torch.equal(lens(ids).logits, plain)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.attn.hook_rot_k"]
    with lens.capture(names) as captured:
        lens(ids)
    with lens.edit(*(ops.replace(name, captured[name]) for name in names)):
        assert torch.equal(lens(ids).logits, plain)


@pytest.mark.parametrize(
    "name",
    ["embed.hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
    + [f"blocks.1.attn.{tap}" for tap in ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z")]
    + ["blocks.1.hook_attn_out", "ln_final.hook_normalized", "unembed.hook_logits"],
)
def test_an_edit_at_some_tokens_reaches_what_follows(name: str, model: Any) -> None:
    lens, ids = Lens(model), sample_ids()
    at = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    at[:, 4] = True
    plain = lens(ids).logits
    with lens.capture([name]) as before:
        lens(ids)
    with lens.edit(ops.scale(name, 0.5, at=at)), lens.capture([name]) as after:
        changed = lens(ids).logits
    assert torch.equal(after[name][:, 4], before[name][:, 4] * 0.5)
    assert torch.equal(changed[:, :4], plain[:, :4])
    assert not torch.allclose(changed[:, 4:], plain[:, 4:], atol=1e-4)
    assert_untouched(model)


def test_edits_apply_in_the_order_given() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_resid_post"
    one, double = ops.add(name, torch.ones(WIDTH)), ops.scale(name, 2.0)
    with lens.capture([name]) as plain:
        lens(ids)
    with lens.edit(one, double), lens.capture([name]) as first:
        lens(ids)
    with lens.edit(double), lens.edit(one), lens.capture([name]) as second:
        lens(ids)
    assert torch.equal(first[name], (plain[name] + 1) * 2)
    assert torch.equal(second[name], plain[name] * 2 + 1)


def test_a_middle_replaced_is_the_stream_from_there_on() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_resid_mid"
    other = torch.randn(1, ids.shape[1], WIDTH, generator=torch.Generator().manual_seed(3))
    with (
        lens.edit(ops.replace(name, other)),
        lens.capture([name, "blocks.1.hook_mlp_out", "*.hook_resid_post"]) as seen,
    ):
        lens(ids)
    expected = other + seen["blocks.1.hook_mlp_out"]
    torch.testing.assert_close(seen["blocks.1.hook_resid_post"], expected)


def test_meta_branch_removed_is_a_model_without_it() -> None:
    model, ids = build(), sample_ids()
    without = build(meta_attention_layers="none")
    without.load_state_dict(model.state_dict(), strict=False)
    lens = Lens(model)
    with lens.edit(ops.scale("blocks.*.hook_meta_out", 0.0)):
        removed = lens(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(removed, without(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rope", "learned", "alibi", "eager", "gpt2", "gpt-neo"])
def test_cut_keys_take_no_part_in_the_softmax(name: str) -> None:
    """o = (o_all - sum over the cut keys of a v) / (1 - their mass), at every query but the cut ones themselves."""
    model, ids = MODELS[name](), sample_ids()
    lens, is_key = Lens(model), torch.zeros(1, 12, dtype=torch.bool)
    is_key[:, [1, 3]] = True
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    taps = ["blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k", "blocks.0.attn.hook_v", "blocks.0.attn.hook_z"]
    masks = []
    with lens.observe(lambda call: masks.append(call.mask)), lens.capture(taps) as before:
        lens(ids)
    with lens.edit(ops.cut_edges([0], query=everywhere, key=is_key)), lens.capture(taps) as after:
        lens(ids)
    query, key, value, z = (before[tap].transpose(1, 2) for tap in taps)
    scores = query @ key.transpose(-1, -2) * lens.layout.blocks[0].attentions[0].scaling
    mask = masks[0]
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    weights = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    weights = weights * ~torch.eye(12, dtype=torch.bool)[None, None].logical_and(is_key[:, None, None, :])
    of_cut = torch.where(is_key[:, None, None, :], weights, 0)
    expected = (z - of_cut @ value) / (1 - of_cut.sum(-1, keepdim=True))
    others = ~is_key[0]
    torch.testing.assert_close(
        after[taps[3]].transpose(1, 2)[:, :, others], expected[:, :, others], rtol=1e-3, atol=1e-4
    )


def test_meta_edges_cut_leave_each_meta_token_to_itself() -> None:
    lens, ids = Lens(build()), sample_ids()
    is_meta = ids == META
    taps = ["blocks.1.meta_attn.hook_v", "blocks.1.meta_attn.hook_z"]
    with (
        lens.edit(ops.cut_edges(None, query=is_meta, key=is_meta, branch="meta_attn")),
        lens.capture(taps, at=is_meta) as captured,
    ):
        lens(ids)
    torch.testing.assert_close(captured[taps[1]], captured[taps[0]], rtol=1e-5, atol=1e-6)


def test_older_meta_edges_cut_keep_the_nearest() -> None:
    model, ids = build(), sample_ids()
    lens, is_meta, taps = Lens(model), ids == META, ["blocks.0.meta_attn.hook_z"]
    with lens.capture(taps) as whole:
        lens(ids)
    for num_kept in (0, 1, 2):
        with lens.edit(ops.cut_older_edges([0], is_meta=is_meta, num_kept=num_kept)), lens.capture(taps) as cut:
            lens(ids)
        same = (cut[taps[0]] - whole[taps[0]]).abs().amax((-1, -2)) < 1e-6
        assert same[0].tolist() == [True, num_kept >= 1, num_kept >= 2]


EDITS = {
    "replace": lambda at: ops.replace("blocks.1.hook_resid_post", torch.ones(WIDTH), at=at),
    "keys": lambda at: ops.scale("blocks.0.attn.hook_rot_k", 0.0, at=at),
    "meta branch": lambda _: ops.scale("blocks.*.hook_meta_out", 0.0),
    "edges": lambda at: ops.cut_edges([0, 2], query=torch.ones(1, 12, dtype=torch.bool), key=at),
    "meta edges": lambda at: ops.cut_edges(None, query=torch.ones_like(at), key=at, branch="meta_attn"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["rope", "alibi", "all", "eager"])
def test_edits_mean_the_same_under_cached_decoding(name: str, edit: str) -> None:
    model, ids = MODELS[name](), sample_ids()
    lens, at = Lens(model), ids == META
    with lens.edit(EDITS[edit](at)):
        whole = lens(ids).logits
        cache = DynamicCache(config=model.config)
        steps = [lens(ids[:, :6], past_key_values=cache, use_cache=True).logits]
        steps += [lens(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 12)]
    assert not torch.allclose(whole, lens(ids).logits, atol=1e-3)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_behind_when_the_model_raises() -> None:
    model = build()
    lens = Lens(model)
    with pytest.raises(ValueError, match="exactly one"), lens.capture(["*"]), lens.edit(ops.scale("*.hook_z", 0.0)):
        lens()
    assert_untouched(model)


def test_observers_see_every_attention_with_its_mask() -> None:
    lens, ids, calls = Lens(build()), sample_ids(), []
    cut = ops.cut_edges([1], query=ids != META, key=ids == META)
    with lens.edit(cut), lens.observe(calls.append):
        lens(ids)
    assert [(call.layer, call.branch) for call in calls] == [(i, b) for i in range(3) for b in ("attn", "meta_attn")]
    assert calls[0].mask is None
    assert not calls[2].mask[0, 0, 4, 2]
    assert calls[1].columns.tolist() == [[2, 5, 9], [1, 7, -1]]
    cache = DynamicCache(config=lens.model.config)
    lens(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(UsageError, match="expected no cached tokens, found 12"), lens.observe(calls.append):
        lens(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_mistake_is_one_line() -> None:
    model, ids = build(meta_attention_layers=[1]), sample_ids()
    lens = Lens(model)
    at = ids == META
    with (
        pytest.raises(UsageError, match=r"did you mean 'blocks\.0\.hook_resid_mid'"),
        lens.capture(["blocks.0.resid_mid"]),
    ):
        pass
    with lens.capture(["*.hook_resid_post"]):
        lens(ids)
        with pytest.raises(UsageError, match="expected one forward pass"):
            lens(ids)
    with lens.capture(["blocks.1.hook_meta_out"]) as captured:
        lens(ids.clamp(max=META - 1))
    with pytest.raises(UsageError, match="no forward pass with meta-tokens"):
        captured["blocks.1.hook_meta_out"]
    with pytest.raises(UsageError, match="only read"), lens.edit(ops.scale("blocks.0.attn.hook_result", 0.0)):
        pass
    cut = ops.cut_edges([0, 1, 2], query=at, key=at, branch="meta_attn")
    with pytest.raises(UsageError, match=r"expected some of \[1\], found \[0, 2\]"), lens.edit(cut):
        pass
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UsageError, match="expected eager or sdpa"), lens.edit(ops.cut_edges([0], query=at, key=at)):
        lens(ids)
    model.train()
    with pytest.raises(UsageError, match="found training mode"):
        lens(ids)
    with pytest.raises(UsageError, match=r"model\.eval"):
        Lens(model)
    with pytest.raises(UsageError, match="found Linear"):
        Lens(nn.Linear(1, 1).eval())  # type: ignore[arg-type]
