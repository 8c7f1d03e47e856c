"""Edits of activations and of attention edges change what they name, and mean the same with and without a cache."""

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2LMHeadModel, GPTNeoForCausalLM

from baseline_models import BASELINES, baseline_model
from lens_models import META, MODELS, WIDTH, assert_untouched, build, sample_ids
from metatokens.errors import UsageError
from metatokens.lens import Lens, edits
from metatokens.model.compatibility import CACHE_NAME
from pairwise import all_pairs
from tiny_models import tokens


@pytest.fixture(params=MODELS, name="model")
def fixture_model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_no_edit_and_an_activations_own_value_change_nothing(model: Any) -> None:
    lens, ids = Lens(model), sample_ids()
    plain = lens(ids).logits
    with lens.edit():
        assert torch.equal(lens(ids).logits, plain)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.attn.hook_rot_k"]
    with lens.capture(names) as captured:
        lens(ids)
    with lens.edit(*(edits.replace(name, captured[name]) for name in names)):
        assert torch.equal(lens(ids).logits, plain)


TAPS = ["embed.hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
TAPS += [f"blocks.1.attn.{tap}" for tap in ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z")]
TAPS += ["blocks.1.hook_attn_out", "ln_final.hook_normalized", "unembed.hook_logits"]
ARCHITECTURES = ("rope", "gpt2", "gpt-neo")
# every tap of each architecture; of the variants of one, those in whose attention they differ
SOME = ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in MODELS for name in (TAPS if kind in ARCHITECTURES else SOME)]
)
def test_an_edit_at_some_tokens_reaches_what_follows(kind: str, name: str) -> None:
    model = MODELS[kind]()
    lens, ids = Lens(model), sample_ids()
    at = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    at[:, 4] = True
    plain = lens(ids).logits
    with lens.capture([name]) as before:
        lens(ids)
    with lens.edit(edits.scale(name, 0.5, at=at)), lens.capture([name]) as after:
        changed = lens(ids).logits
    assert torch.equal(after[name][:, 4], before[name][:, 4] * 0.5)
    assert torch.equal(changed[:, :4], plain[:, :4])
    assert not torch.allclose(changed[:, 4:], plain[:, 4:], atol=1e-4)
    assert_untouched(model)


def test_edits_apply_in_the_order_given() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_resid_post"
    one, double = edits.transform(name, lambda old: old + 1), edits.scale(name, 2.0)
    with lens.capture([name]) as plain:
        lens(ids)
    with lens.edit(one, double), lens.capture([name]) as first:
        lens(ids)
    with lens.edit(double), lens.edit(one), lens.capture([name]) as second:
        lens(ids)
    assert torch.equal(first[name], (plain[name] + 1) * 2)
    assert torch.equal(second[name], plain[name] * 2 + 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_contexts_may_end_in_any_order_and_each_takes_its_own_away(order: tuple[int, ...]) -> None:
    lens, ids, fresh = Lens(build()), sample_ids(), Lens(build())
    twice = edits.scale("blocks.0.hook_mlp_out", 0.5)
    changes = [twice, edits.transform("blocks.0.hook_mlp_out", lambda old: old + 1), twice]
    contexts = [lens.edit(change) for change in changes]
    for context in contexts:
        context.__enter__()
    for done, number in enumerate(order, start=1):
        contexts[number].__exit__(None, None, None)
        with fresh.edit(*(change for i, change in enumerate(changes) if i not in order[:done])):
            assert torch.equal(lens(ids).logits, fresh(ids).logits)
    assert_untouched(lens.model)


def test_an_edit_that_ends_first_leaves_a_capture_and_an_observer_at_work() -> None:
    lens, ids, calls = Lens(build()), sample_ids(), []
    edit, observe = lens.edit(edits.scale("blocks.0.hook_mlp_out", 0.0)), lens.observe(calls.append)
    plain = lens(ids).logits
    edit.__enter__()
    observe.__enter__()
    with lens.capture(["unembed.hook_logits"]) as captured:
        edit.__exit__(None, None, None)
        lens(ids)
    assert torch.equal(captured["unembed.hook_logits"], plain)
    assert calls
    observe.__exit__(None, None, None)
    assert_untouched(lens.model)


def test_an_error_inside_of_a_context_leaves_the_outer_one_at_work() -> None:
    lens, ids = Lens(build()), sample_ids()
    with lens.edit(edits.scale("blocks.0.hook_mlp_out", 0.0)):
        changed = lens(ids).logits
        with pytest.raises(ZeroDivisionError), lens.edit(edits.scale("blocks.1.hook_mlp_out", 0.0)):
            raise ZeroDivisionError
        assert torch.equal(lens(ids).logits, changed)
    assert_untouched(lens.model)


def test_a_middle_replaced_is_the_stream_from_there_on() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_resid_mid"
    other = torch.randn(1, ids.shape[1], WIDTH, generator=torch.Generator().manual_seed(3))
    with (
        lens.edit(edits.replace(name, other)),
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
    with lens.edit(edits.scale("blocks.*.hook_meta_out", 0.0)):
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
    with lens.edit(edits.cut_edges([0], query=everywhere, key=is_key)), lens.capture(taps) as after:
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
        lens.edit(edits.cut_edges(None, query=is_meta, key=is_meta, branch="meta_attn")),
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
        with lens.edit(edits.cut_older_edges([0], is_meta=is_meta, num_kept=num_kept)), lens.capture(taps) as cut:
            lens(ids)
        same = (cut[taps[0]] - whole[taps[0]]).abs().amax((-1, -2)) < 1e-6
        assert same[0].tolist() == [True, num_kept >= 1, num_kept >= 2]


def test_keys_cut_everywhere_are_keys_that_are_masked(model: Any) -> None:
    """In every layer and attention; the cut tokens themselves go on, and nobody else sees them."""
    lens, ids, hidden = Lens(model), sample_ids(), torch.zeros(2, 12, dtype=torch.bool)
    hidden[0, [1, 2, 6]], hidden[1, [4, 7]] = True, True
    positions = torch.arange(12)[None]
    masked = lens(ids, attention_mask=(~hidden).long(), position_ids=positions).logits
    branches = {site.branch for block in lens.layout.blocks for site in block.attentions}
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    cuts = [edits.cut_edges(None, query=everywhere, key=hidden, branch=branch) for branch in branches]
    plain = lens(ids).logits
    with lens.edit(*cuts):
        cut = lens(ids).logits
    torch.testing.assert_close(cut[~hidden], masked[~hidden], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(cut[~hidden], plain[~hidden], atol=1e-2)


def test_the_edge_of_a_token_to_itself_is_never_cut(model: Any) -> None:
    lens, ids, everywhere = Lens(model), sample_ids(), torch.ones(1, 12, dtype=torch.bool)
    taps = ["blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]
    cut = edits.cut_edges([1], query=everywhere, key=everywhere)
    with lens.edit(cut), lens.capture(taps) as captured:
        lens(ids)
    torch.testing.assert_close(captured[taps[1]], captured[taps[0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tap", ["hook_resid_post", "attn.hook_z", "meta_attn.hook_k", "hook_meta_out"])
def test_packed_states_of_one_text_are_put_into_another(tap: str) -> None:
    """Interchange: as many tokens, at places of their own in each text."""
    lens, clean, corrupt, name = Lens(build()), sample_ids(), sample_ids().flip(1), f"blocks.1.{tap}"
    from_clean, into_corrupt = clean == META, corrupt == META
    with lens.capture([name], at=from_clean) as states:
        lens(clean)
    with (
        lens.edit(edits.replace(name, states[name], at=into_corrupt)),
        lens.capture([name], at=into_corrupt) as put,
        lens.capture([name]) as whole,
    ):
        lens(corrupt)
    assert torch.equal(put[name], states[name])
    with lens.capture([name]) as before:
        lens(corrupt)
    if "meta_attn" not in tap:
        assert torch.equal(whole[name][~into_corrupt], before[name][~into_corrupt])
    with lens.edit(edits.replace(name, put[name], at=into_corrupt)):
        patched = lens(corrupt).logits
    with lens.capture([name], at=into_corrupt) as own:
        plain = lens(corrupt).logits
    assert not torch.allclose(patched, plain, atol=1e-3)
    with lens.edit(edits.replace(name, own[name], at=into_corrupt)):
        assert torch.equal(lens(corrupt).logits, plain)


def test_all_states_of_another_text_give_its_logits(model: Any) -> None:
    lens, clean, corrupt, name = Lens(model), sample_ids(), sample_ids().flip(1), "blocks.1.hook_resid_post"
    with lens.capture([name]) as states:
        expected = lens(clean).logits
    # later layers of meta-attention pack by the ids; without them the states are all there is
    off = [edits.scale("blocks.2.hook_meta_out", 0.0)] if "blocks.2.hook_meta_out" in lens.names else []
    with lens.edit(*off):
        expected = lens(clean).logits
        with lens.edit(edits.replace(name, states[name])):
            torch.testing.assert_close(lens(corrupt).logits, expected)


def test_an_erased_direction_is_gone_where_asked() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.0.hook_resid_post"
    direction = torch.nn.functional.normalize(torch.arange(1, WIDTH + 1, dtype=torch.float64), dim=0)
    at = ids == META
    with lens.capture([name]) as before:
        lens(ids)
    erase = edits.transform(name, lambda old: old - (old @ direction)[..., None] * direction, at=at)
    with lens.edit(erase), lens.capture([name]) as after:
        lens(ids)
    assert float((after[name][at] @ direction).abs().max()) < 1e-4
    assert float((before[name][at] @ direction).abs().max()) > 0.1
    assert torch.equal(after[name][~at], before[name][~at])


def test_an_edit_of_the_meta_branch_stays_at_the_meta_tokens() -> None:
    lens, ids, name = Lens(build()), sample_ids(), "blocks.1.hook_meta_out"
    taps = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", name, "blocks.1.hook_resid_mid"]
    with lens.edit(edits.replace(name, torch.ones(WIDTH))), lens.capture(taps) as captured:
        lens(ids)
    assert torch.equal(captured[name], (ids == META)[..., None].expand(-1, -1, WIDTH).double())
    total = sum(captured[tap] for tap in taps[:3])
    torch.testing.assert_close(total, captured[taps[3]], rtol=0, atol=1e-5)


OPS = {
    "replace": lambda at: edits.replace("x", torch.ones(4), at=at),
    "scale": lambda at: edits.scale("x", 0.5, at=at),
    "transform": lambda at: edits.transform("x", torch.tanh, at=at),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("masked", [True, False])
def test_edits_are_pure(op: str, masked: bool) -> None:
    old, columns = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)[None]
    at = torch.tensor([[True, False, True]]) if masked else None
    before = old.clone()
    new = OPS[op](at).change(old, columns)
    assert torch.equal(old, before)
    assert new.data_ptr() != old.data_ptr()
    assert not torch.equal(new[0, 0], old[0, 0])
    assert torch.equal(new[0, 1], old[0, 1]) == masked


def test_values_that_fit_nowhere_are_refused() -> None:
    lens, ids = Lens(build()), sample_ids()
    at = ids == META
    packed_tap, tap = "blocks.1.meta_attn.hook_z", "blocks.1.hook_resid_post"
    with lens.capture([packed_tap]) as captured:
        lens(ids)
    wrong = [
        (edits.replace(packed_tap, captured[packed_tap]), "a value for each column"),
        (edits.replace(tap, torch.zeros(4, WIDTH), at=at), "expected 5 values, one for each token that `at` selects"),
        (edits.replace(tap, torch.zeros(12, WIDTH)), r"expected a value for all tokens, \(16,\)"),
        (edits.replace(tap, torch.zeros(2, 8, WIDTH), at=at), "a value for each column"),
        (edits.scale(tap, 0.0, at=at.repeat(2, 1)), "nor for each of 2"),
        (edits.cut_edges(None, query=at.repeat(2, 1), key=at), "nor for each of 2"),
    ]
    for edit, message in wrong:
        with pytest.raises(ValueError, match=message), lens.edit(edit):
            lens(ids)
    for build_edit in (
        lambda: edits.scale(tap, 0.0, at=ids),
        lambda: edits.cut_edges(None, query=at[0], key=at),
        lambda: edits.cut_older_edges(None, is_meta=ids, num_kept=1),
    ):
        with pytest.raises(ValueError, match="positions are a mask"):
            build_edit()
    landmark = Lens(baseline_model("landmark"))
    cut = edits.cut_edges(None, query=at, key=at)
    with pytest.raises(UsageError, match="found Landmarks"), landmark.edit(cut):
        landmark(ids.clamp(max=20))


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "landmark"])
def test_edges_cut_from_a_sparse_pattern_leave_the_rest_of_it(name: str) -> None:
    model, ids = baseline_model(name), tokens("xx_xx_xxx_x", "_xxx_xxxx_x")
    lens, calls = Lens(model), []
    is_key = torch.arange(11)[None] == 3
    with lens.observe(calls.append):
        lens(ids)
        with lens.edit(edits.cut_edges(None, query=torch.ones_like(is_key), key=is_key)):
            lens(ids)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    half = len(calls) // 2
    for before, after in zip(calls[:half], calls[half:], strict=True):
        expected = (causal if before.mask is None else before.mask & causal).expand(2, 1, 11, 11).clone()
        expected[:, :, 4:, 3] = False
        assert torch.equal(after.mask & causal, expected)


EVEN = torch.arange(12)[None] % 2 == 0
EDITS = {
    "replace": lambda at: edits.replace("blocks.1.hook_resid_post", torch.ones(WIDTH), at=at),
    "packed": lambda at: edits.replace("blocks.1.hook_mlp_out", torch.eye(WIDTH)[: int(at.sum())] * 5, at=at),
    "middle": lambda at: edits.transform(
        "blocks.1.hook_resid_mid", lambda old: old + torch.linspace(-3, 3, WIDTH), at=at
    ),
    "keys": lambda at: edits.scale("blocks.0.attn.hook_rot_k", 0.0, at=at),
    "edges": lambda at: edits.cut_edges([0, 1], query=torch.ones(1, 12, dtype=torch.bool), key=at),
    "meta branch": lambda _: edits.scale("blocks.*.hook_meta_out", 0.0),
    "meta edges": lambda _: edits.cut_edges(None, query=EVEN | True, key=EVEN, branch="meta_attn"),
}


@all_pairs(edit=EDITS, padded=[False, True], kind=MODELS)
def test_edits_mean_the_same_under_cached_decoding(edit: str, padded: bool, kind: str) -> None:
    model = MODELS[kind]()
    lens, ids = Lens(model), sample_ids()
    at, mask = ids == META, torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
        at = at & mask.bool()
    needs_branch = edit.startswith("meta")
    if needs_branch and "blocks.1.hook_meta_out" not in lens.names:
        with pytest.raises(ValueError, match=r"no tap|edges can be cut"), lens.edit(EDITS[edit](at)):
            pass
        return
    with lens.edit(EDITS[edit](at)):
        whole = lens(ids, attention_mask=mask).logits
        cache, steps = DynamicCache(config=model.config), []
        for start, stop in [(0, 6), (6, 9), *((i, i + 1) for i in range(9, 12))]:
            inputs = {"attention_mask": mask[:, :stop], CACHE_NAME: cache, "use_cache": True}
            if isinstance(model, GPT2LMHeadModel | GPTNeoForCausalLM):  # whose positions do not follow from the mask
                inputs["position_ids"] = torch.arange(start, stop)[None]
            steps.append(lens(ids[:, start:stop], **inputs).logits)
    plain = lens(ids, attention_mask=mask).logits
    real = mask.bool()
    assert not torch.allclose(whole[real], plain[real], atol=1e-3)
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], whole[real], rtol=1e-3, atol=1e-3)


def test_generation_under_edits_needs_no_cache_to_say_the_same() -> None:
    model, ids = build(), sample_ids()[:1]
    lens, at = Lens(model), ids == META
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    # prefill makes the logits of the last token alone, so an edit of them must find its column
    last = edits.replace("unembed.hook_logits", torch.eye(50)[7] * 1000, at=torch.arange(12)[None] == 11)
    steer = edits.transform("blocks.2.hook_resid_post", lambda old: old + torch.linspace(-9, 9, WIDTH))
    with lens.edit(last, steer, edits.cut_edges(None, query=torch.ones(1, 20, dtype=torch.bool), key=at)):
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert int(cached[0, 12]) == 7
    assert not torch.equal(cached[0, 13:], plain[0, 13:])


@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_an_edit_of_the_logits_counts_in_the_loss(logits_to_keep: int) -> None:
    lens, ids = Lens(build().double()), sample_ids()
    at = torch.arange(ids.shape[1]) < 4
    with lens.edit(edits.scale("unembed.hook_logits", 0.0, at=at.expand(ids.shape))):
        output = lens(ids, shift_labels=ids, logits_to_keep=logits_to_keep)
    targets = ids.masked_fill(at, -100)
    rest = lens(ids, shift_labels=targets, num_items_in_batch=1).loss
    guessing = math.log(lens.model.config.vocab_size) * int(at.sum()) * len(ids)
    assert float(output.loss) == pytest.approx(float(rest + guessing) / ids.numel(), rel=1e-9)
