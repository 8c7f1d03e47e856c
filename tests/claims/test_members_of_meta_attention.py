"""Who takes part in meta-attention: the meta-tokens (section 3), every token, or text tokens drawn by a hash."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metatokens.model import MetaTokenForCausalLM
from metatokens.model.accounting import count_parameters, forward_flops, training_flops
from metatokens.model.masks import TokenLayout
from metatokens.model.meta_attention import choose_members, hash_integers
from tiny_models import EOS, META, PAD, assert_close, attention_mask_of, tiny_config, tiny_model, tokens

RANDOM = {"meta_attention_over": "random", "random_ratio": 0.4}


def members(ids: Tensor, **changes: Any) -> Tensor:
    """Return the tokens of `ids` that take part, positions counted from each row's first real token."""
    mask = attention_mask_of(ids)
    layout = TokenLayout((mask.cumsum(-1) - 1).clamp(min=0), mask, documents=None, bias=None)
    return choose_members(tiny_config(**changes), input_ids=ids, meta_token_mask=ids == META, layout=layout, seen=0)


def test_all_means_every_token_but_padding() -> None:
    ids = tokens("..x_xx_", "x_xxx..")
    assert torch.equal(members(ids, meta_attention_over="all"), ids != PAD)


def test_random_never_means_a_meta_token_or_padding() -> None:
    ids = tokens("..x_xx_", "x_xxx..")
    chosen = members(ids, meta_attention_over="random", random_ratio=1.0)
    assert torch.equal(chosen, (ids != PAD) & (ids != META))
    assert not members(ids, meta_attention_over="random", random_ratio=0.0).any()


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_random_tokens_are_the_share_that_was_asked_for_at_every_position_and_for_every_id(ratio: float) -> None:
    ids = torch.arange(1000).expand(1000, -1)
    positions = torch.arange(1000)[:, None].expand_as(ids)
    chosen = (hash_integers(positions, ids) < ratio * 2**32).double()
    assert chosen.mean().item() == pytest.approx(ratio, abs=0.001)
    # six standard deviations of a mean over 1,000 draws
    spread = 6 * (ratio * (1 - ratio) / 1000) ** 0.5
    assert ((chosen.mean(0) - ratio).abs() < spread).all()
    assert ((chosen.mean(1) - ratio).abs() < spread).all()
    # neighbours are chosen independently of each other
    for shifted in (chosen[1:, :-1] * chosen[:-1, 1:], chosen[1:] * chosen[:-1], chosen[:, 1:] * chosen[:, :-1]):
        assert shifted.mean().item() == pytest.approx(ratio**2, abs=0.002)


def test_the_hash_is_the_one_that_trained_models_were_drawn_with() -> None:
    expected = []
    for position, token in ((0, 0), (0, 1), (1, 0), (1023, 50_256)):
        mixed = 0
        for value in (position, token):
            mixed ^= value
            for _ in range(2):
                mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B % 2**32
            mixed = (((mixed >> 16) ^ mixed) + 0x1E3779B9) % 2**32
        expected.append(mixed)
    pairs = torch.tensor([[0, 0], [0, 1], [1, 0], [1023, 50_256]])
    assert hash_integers(pairs[:, 0], pairs[:, 1]).tolist() == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("over", ["all", "random"])
@torch.no_grad()
def test_a_row_gives_the_same_logits_alone_and_padded_in_a_batch(over: str) -> None:
    model = tiny_model(meta_attention_over=over, random_ratio=0.4, dtype=torch.float64)
    row = tokens("x_xx_xxx_xxx", seed=3)
    padding = torch.full((1, 4), PAD)
    other = tokens("xxxxxxxxxxxxxxxx", seed=4)
    alone = model(row).logits
    for parts, columns in (((padding, row), slice(4, 16)), ((row, padding), slice(0, 12))):
        batch = torch.cat([torch.cat(parts, dim=1), other])
        assert_close(model(batch, attention_mask=attention_mask_of(batch)).logits[:1, columns], alone, 1e-10)


@pytest.mark.parametrize("over", ["all", "random"])
@torch.no_grad()
def test_the_collators_indices_do_not_decide_who_takes_part(over: str) -> None:
    model = tiny_model(meta_attention_over=over, random_ratio=0.4)
    ids = tokens("x_xx_xxx", "_xxxx_xx")
    meta_indices = (ids == META).nonzero()[:, 1].view(2, -1)
    assert torch.equal(model(ids, meta_indices=meta_indices).logits, model(ids).logits)


@pytest.mark.parametrize("encoding", ["rope", "learned", "alibi", "none"])
@torch.no_grad()
def test_double_attention_on_meta_tokens_alone_is_meta_attention(encoding: str) -> None:
    ids = tokens("________", "________")
    double, meta = (
        tiny_model(position_encoding=encoding, meta_attention_over=over, dtype=torch.float64)
        for over in ("all", "meta")
    )
    assert_close(double(ids).logits, meta(ids).logits, 1e-10)


@torch.no_grad()
def test_each_choice_gives_other_logits() -> None:
    ids = tokens("x_xx_xxx_xxx")
    logits = [tiny_model(meta_attention_over=over, random_ratio=0.4)(ids).logits for over in ("meta", "all", "random")]
    for i in range(3):
        assert (logits[i] - logits[i - 1]).abs().max() > 0.1


@pytest.mark.parametrize("over", ["all", "random"])
@torch.no_grad()
def test_generation_with_a_static_cache_equals_that_with_a_growing_one(over: str) -> None:
    model = tiny_model(meta_attention_over=over, random_ratio=0.4)
    ids = tokens("..x_xx", "xx_xxx")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": attention_mask_of(ids), "eos_token_id": None}
    growing = model.generate(ids, **options)
    static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(growing, static)


def test_random_tokens_without_ids_raise_an_error() -> None:
    with pytest.raises(ValueError, match="give input_ids"):
        tiny_model(**RANDOM)(inputs_embeds=torch.zeros(1, 4, 32))


def test_random_tokens_that_never_are_chosen_still_train_every_parameter() -> None:
    model = tiny_model(meta_attention_over="random", random_ratio=0.0).train()
    ids = tokens("x_xx_x")
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_double_attention_has_the_parameters_of_meta_attention() -> None:
    sizes = {over: tiny_model(meta_attention_over=over).num_parameters() for over in ("meta", "all", "random")}
    assert len(set(sizes.values())) == 1
    assert count_parameters(tiny_config(meta_attention_over="all")).total == sizes["meta"]


def test_double_attention_costs_what_meta_attention_over_as_many_meta_tokens_costs() -> None:
    # with the head's saving at meta-tokens put back
    config, double = tiny_config(), tiny_config(meta_attention_over="all")
    head = 2 * 40 * config.hidden_size * config.vocab_size
    assert forward_flops(double, num_positions=40) == forward_flops(config, num_positions=40, num_meta=40) + head
    assert training_flops(double, num_positions=40) == 3 * forward_flops(double, num_positions=40)


def test_random_tokens_cost_what_their_expected_number_of_meta_tokens_costs() -> None:
    width, layers = 32, 2
    plain = forward_flops(tiny_config(meta_attention_layers="none"), num_positions=60, num_meta=10)
    expected = round(0.4 * 50)
    extra = layers * (2 * expected * 4 * width * width + 4 * width * expected * (expected + 1) // 2)
    assert forward_flops(tiny_config(**RANDOM), num_positions=60, num_meta=10) == plain + extra


def test_flops_counted_for_double_attention_are_those_of_its_products() -> None:
    def measured(model: MetaTokenForCausalLM, ids: Tensor) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False)
        return counter.get_total_flops()

    ids = tokens("x" * 32) % EOS
    for over in ("all", "random"):
        shape = {"meta_attention_over": over, "random_ratio": 0.4, "attn_implementation": "eager"}
        model, plain = tiny_model(**shape), tiny_model(attn_implementation="eager", meta_attention_layers="none")
        num = int(members(ids, **shape).sum())
        # the eager products are square; the count has only what causality allows
        square = model.config.num_hidden_layers * (2 * num * 4 * 32 * 32 + 4 * 32 * num * num)
        assert measured(model, ids) - measured(plain, ids) == square
