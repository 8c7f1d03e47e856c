"""Randomised positions (Ruoss et al. 2023): drawn in training, evenly spread otherwise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from baseline_models import baseline_model
from cached_passes import CACHES, PIECES, feed, uncached
from dense_model import count_tokens, dense_logits, turn_at
from metatokens.baselines import masks
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.accounting import count_parameters
from metatokens.model.position_bias import alibi_slopes
from metatokens.model.position_range import draw_positions
from metatokens.model.reference import DenseReferenceForCausalLM
from pairwise import all_pairs
from tiny_models import (
    BACKENDS,
    ENCODINGS,
    MAX_LENGTH,
    MEMBERS,
    PAD,
    assert_close,
    attention_mask_of,
    gradients,
    tiny_config,
    tiny_model,
    tokens,
)

RANGE = 150
PLACED = tuple(encoding for encoding in ENCODINGS if encoding != "none")
ROWS = ("..x_x_xx__xx", "_xx_xxxx_xx.", "xxxxx_xxxxxx")


def model_of(encoding: str, **changes: Any) -> MetaTokenForCausalLM:
    return tiny_model(position_encoding=encoding, position_range=RANGE, **changes)


def plain_twin(encoding: str, **changes: Any) -> MetaTokenForCausalLM:
    """Return a model of the same function of positions, which takes them as they are."""
    return tiny_model(position_encoding=encoding, max_position_embeddings=RANGE, **changes)


def spread(numbers: Tensor) -> Tensor:
    return torch.tensor(
        [[math.floor((i + 1) * (RANGE + 1) / (MAX_LENGTH + 1)) - 1 for i in row] for row in numbers.tolist()]
    )


def drawn_for(ids: Tensor, seed: int) -> Tensor:
    """Return what a forward pass in training draws first behind this seed, for each token (B, T)."""
    torch.manual_seed(seed)
    lengths = (ids != PAD).sum(-1, keepdim=True)
    return draw_positions(lengths, RANGE).gather(1, count_tokens(ids))


def bias_at(model: Any, encoding: str, positions: Tensor) -> Tensor | None:
    """Return (B, H, T, T) by the formula of each encoding."""
    distance = (positions[:, None, :, None] - positions[:, None, None]).clamp(min=0).double()
    if encoding == "alibi":
        return -torch.tensor(alibi_slopes(4), dtype=torch.float64)[:, None, None] * distance
    if encoding == "kerple":
        factor, rate = model.model.kernel.weight.clamp(min=0.01)[..., None, None]
        return -factor * (1 + rate * distance).log()
    if encoding == "t5":
        far = 16 + (16 * (distance.clamp(min=16) / 16).log() / math.log(8) + 1e-9).floor().clamp(max=15)
        return model.model.distance_bias.weight[torch.where(distance < 16, distance, far).long()[:, 0]].movedim(-1, 1)
    return None


def definition(model: Any, encoding: str, ids: Tensor, positions: Tensor) -> Tensor:
    turn = turn_at(model, positions) if encoding in ("rope", "xpos", "fourier") else None
    added = model.model.embed_positions.weight[positions] if encoding == "learned" else None
    bias = bias_at(model, encoding, positions)
    return dense_logits(model, ids, turn_of=lambda _: turn, added=added, bias=bias)


def run(make: Callable[[], tuple[Any, Tensor]], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model, logits = make()
    logits[ids != PAD].square().sum().backward()
    return logits.detach()[ids != PAD], gradients(model)


@all_pairs(
    encoding=("rope", "xpos", "fourier", "learned", "alibi", "kerple", "t5"), training=(True, False), backend=BACKENDS
)
def test_logits_and_gradients_are_those_of_the_definition(encoding: str, training: bool, backend: str) -> None:
    ids = tokens(*ROWS)
    positions = drawn_for(ids, 5) if training else spread(count_tokens(ids))

    def ours() -> tuple[Any, Tensor]:
        model = model_of(encoding, attn_implementation=backend).train(training)
        torch.manual_seed(5)
        model.makes_logits_in_training = True
        return model, model(ids, attention_mask=attention_mask_of(ids)).logits

    def expected() -> tuple[Any, Tensor]:
        model = model_of(encoding)
        return model, definition(model, encoding, ids, positions)

    (logits, of_model), (right, of_definition) = run(ours, ids), run(expected, ids)
    assert_close(logits, right, 1e-8)
    assert of_model.keys() == of_definition.keys()
    for name, gradient in of_definition.items():
        assert_close(of_model[name], gradient, 1e-8)


@all_pairs(encoding=PLACED, training=(True, False), backend=BACKENDS, over=MEMBERS)
@torch.no_grad()
def test_every_encoding_sees_the_positions_of_a_model_that_is_given_them(
    encoding: str, training: bool, backend: str, over: str
) -> None:
    ids = tokens("x_x_xx__xx_x", "_xxx_xxxx_xx")
    positions = drawn_for(ids, 3) if training else spread(count_tokens(ids))
    fields = {"attn_implementation": backend, **(MEMBERS[over] if over != "random" else {})}
    model, twin = model_of(encoding, **fields).train(training), plain_twin(encoding, **fields)
    torch.manual_seed(3)
    expected = twin(ids, position_ids=positions).logits
    assert_close(model(ids).logits, expected, 1e-10)
    assert (expected - twin(ids).logits).abs().max() > 1e-3


@all_pairs(encoding=PLACED, pieces=PIECES, kind=CACHES, backend=BACKENDS, over=MEMBERS)
@torch.no_grad()
def test_cached_logits_equal_uncached(encoding: str, pieces: str, kind: str, backend: str, over: str) -> None:
    model, ids = model_of(encoding, attn_implementation=backend, **MEMBERS[over]), tokens(*ROWS)
    cached = feed(model, ids, CACHES[kind](model.config), PIECES[pieces])
    assert_close(cached[ids != PAD], uncached(model, ids)[ids != PAD], 1e-10)


@pytest.mark.parametrize("encoding", PLACED)
@torch.no_grad()
def test_a_row_is_read_alike_alone_padded_packed_and_by_the_dense_reference(encoding: str) -> None:
    model, ids = model_of(encoding), tokens(*ROWS)
    dense = model_of(encoding, model_class=DenseReferenceForCausalLM)
    dense.load_state_dict(model.state_dict())
    together = uncached(model, ids)
    assert_close(uncached(dense, ids)[ids != PAD], together[ids != PAD], 1e-10)
    alone = [model(row[row != PAD][None]).logits[0] for row in ids]
    for row, logits in enumerate(alone):
        assert_close(together[row, ids[row] != PAD], logits, 1e-10)
    packed = torch.cat([row[row != PAD] for row in ids])[None]
    starts = torch.cat([torch.arange(int((row != PAD).sum())) for row in ids])[None]
    assert_close(model(packed, position_ids=starts).logits[0], torch.cat(alone), 1e-10)


@pytest.mark.parametrize("shortest", [1, 512])
@pytest.mark.parametrize("name", ["sliding_window", "landmark"])
@torch.no_grad()
def test_the_biases_of_other_attentions_are_those_of_the_positions(
    name: str, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "SHORTEST", shortest)  # the blocks of a plan, or one mask of all pairs
    ids = tokens("x_x_xx__xx_x", "_xxx_xxxx_xx")
    model = baseline_model(name, position_encoding="t5", position_range=RANGE)
    twin = baseline_model(name, position_encoding="t5", max_position_embeddings=RANGE)
    expected = twin(ids, position_ids=spread(count_tokens(ids))).logits
    assert_close(model(ids).logits, expected, 1e-10)
    assert (expected - twin(ids).logits).abs().max() > 0.01


def test_a_row_gets_as_many_ordered_positions_as_it_has_tokens_each_as_often_as_any_other() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 10, 40, 1]).repeat(2000)[:, None]
    drawn = draw_positions(lengths, 40)
    assert ((drawn < 40).sum(-1) == lengths[:, 0]).all()
    for row, length in zip(drawn[:8], lengths[:8, 0], strict=True):
        own = row[:length].tolist()
        assert own == sorted(set(own))
        assert (row[length:] == 40).all()
    counts = torch.bincount(drawn[lengths[:, 0] == 10].flatten(), minlength=41)[:40]
    assert (counts - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)  # five standard deviations
    assert len({tuple(row) for row in drawn[lengths[:, 0] == 10].tolist()}) == 2000


def test_positions_of_evaluation_are_the_means_of_draws_of_the_longest_text() -> None:
    torch.manual_seed(0)
    drawn = draw_positions(torch.full((4000, 1), MAX_LENGTH), RANGE)[:, :MAX_LENGTH].double()
    model = model_of("alibi")
    layout = model.model._lay_out(torch.zeros(1, MAX_LENGTH, 32), None, None, None, None)
    behind = drawn.mean(0) - layout.positions[0]
    assert behind.min() > -0.5  # of draws whose means are within a fifth of a position or so
    assert behind.max() < 1.5


@torch.no_grad()
def test_two_forward_passes_of_training_draw_other_positions_and_evaluation_none() -> None:
    model, ids = model_of("rope"), tokens("x_x_xx__xx_x")
    state = torch.get_rng_state()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 0.01


def test_a_table_of_learned_positions_has_a_row_for_each_of_the_range() -> None:
    config = tiny_config(position_encoding="learned", position_range=RANGE)
    model = MetaTokenForCausalLM(config)
    assert model.model.embed_positions.weight.shape == (RANGE, 32)
    assert count_parameters(config).total == model.num_parameters()


@torch.no_grad()
def test_generation_with_a_cache_goes_on_as_without_one() -> None:
    model, ids = model_of("learned"), tokens("x_x_xx")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)


def test_what_has_no_place_in_the_range_is_refused_in_one_line() -> None:
    model, ids = model_of("rope"), tokens("x_x_xx")
    with pytest.raises(ValueError, match=f"sequence of {MAX_LENGTH + 1} positions"):
        model(tokens("x" * (MAX_LENGTH + 1)))
    with pytest.raises(ValueError, match="sequence of 100 positions"):
        model(ids, position_ids=torch.arange(94, 100)[None])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_range .*model\.eval\(\)"):
        model.train()(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_range": MAX_LENGTH}, f"position_range {MAX_LENGTH} must exceed max_position_embeddings"),
        ({"position_encoding": "none"}, "position_encoding other than none"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "without RoPE scaling"),
        ({"memory": {"anchors": "meta", "window": 4}}, "memory does not take position_range"),
    ],
)
def test_a_range_that_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        MetaTokenConfig(**{**tiny_config().to_dict(), "position_range": RANGE, **changes})
