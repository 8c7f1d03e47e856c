"""Thoughts after Quiet-STaR: of every n + 2 meta-tokens of a row the first and the last have vectors of their own."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache

from cached_passes import CACHES, PIECES, feed, uncached
from metatokens.config.injection import ThoughtInjection, UniformInjection
from metatokens.config.schema import ModelConfig, PretrainConfig
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import TokenEmbedding, ZeroEmbedding, ZeroPosition, intervene
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.accounting import count_parameters
from metatokens.model.schedule import ThoughtSchedule, schedule_meta_tokens
from pairwise import all_pairs
from tiny_models import META, PAD, assert_close, attention_mask_of, gradients, shared_model, tiny_model, tokens

BATCHES = {
    "whole_thoughts": ("x____xx____x", "xx____x____x"),
    "beside_each_other": ("x________xxx", "____________"),
    "cut_and_padded": ("..xx____x___", "__xxxxx__x_x", ".....x_x____"),
    "none": ("xxxxxxxxxxxx", "...xxxxxxxxx"),
}
OVER = ("meta", "cross", "gather")


def thinking(over: str = "meta", **changes: Any) -> MetaTokenForCausalLM:
    return shared_model(thought_length=2, meta_attention_over=over, **changes)


def entering(model: MetaTokenForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    """Return what enters the first block, (B, T, C)."""
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, **inputs)
    hook.remove()
    return seen[0]


def test_the_first_and_the_last_of_each_thought_have_vectors_of_their_own() -> None:
    model = thinking()
    ids = tokens("x____xx________xx_x___x_")
    added = entering(model, ids)[0] - model.model.embed_tokens(ids)[0]
    start, end = model.model.thought_ends.weight
    expected = torch.zeros_like(added)
    for column in (1, 7, 11, 17):
        expected[column] = start
    for column in (4, 10, 14, 21):
        expected[column] = end
    expected[23] = start  # of a thought that goes on behind
    assert_close(added, expected, 1e-12)
    assert (start - end).abs().max() > 0.1


@all_pairs(batch=BATCHES, pieces=PIECES, kind=CACHES, over=OVER)
@torch.no_grad()
def test_cached_logits_equal_uncached(batch: str, pieces: str, kind: str, over: str) -> None:
    model = thinking(over)
    ids = tokens(*BATCHES[batch])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, CACHES[kind](model.config), PIECES[pieces])
    assert_close(cached[real], uncached(model, ids)[real], 1e-10)


@all_pairs(batch=BATCHES, over=OVER, side=("left", "inside"))
@torch.no_grad()
def test_neither_padding_nor_what_stands_in_it_moves_anything(batch: str, over: str, side: str) -> None:
    model = thinking(over)
    ids = tokens(*BATCHES[batch])
    if side == "inside":
        ids = torch.cat([ids[:, :3], tokens(*["..."] * len(ids)), ids[:, 3:]], dim=1)
    mask = attention_mask_of(ids)
    together = model(ids.masked_fill(mask == 0, META), attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        assert_close(together[row, real], model(ids[row : row + 1, real]).logits[0], 1e-10)


@pytest.mark.parametrize("over", OVER)
@torch.no_grad()
def test_each_document_of_a_row_begins_with_no_thought_open(over: str) -> None:
    model = thinking(over)
    parts = [tokens("x____x_x"), tokens("_x_x"), tokens("x___", seed=1)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    expected = torch.cat([model(part).logits for part in parts], dim=1)
    assert_close(model(torch.cat(parts, dim=1), position_ids=positions).logits, expected, 1e-10)


@pytest.mark.parametrize("kind", [kind for kind, make in CACHES.items() if make(thinking().config).is_croppable])
@torch.no_grad()
def test_logits_after_crop_equal_uncached(kind: str) -> None:
    model = thinking()
    before = tokens(*BATCHES["cut_and_padded"])
    after = torch.cat([before[:, :9], tokens("_x__x", "x___x", "____x", seed=1)], dim=1)
    cache = CACHES[kind](model.config)
    feed(model, before, cache, [12])
    cache.crop(-3)
    real = attention_mask_of(after).bool()[:, 9:]
    assert_close(feed(model, after, cache, [2, 1, 2], start=9)[real], uncached(model, after)[:, 9:][real], 1e-10)


@torch.no_grad()
def test_embeddings_alone_give_the_logits_of_the_ids() -> None:
    model = thinking()
    ids = tokens("x____xx____x")
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


def test_start_and_end_learn() -> None:
    model = tiny_model(thought_length=2).train()
    ids = tokens("x____xx____x")
    model(ids, labels=ids).loss.backward()
    assert (gradients(model)["model.thought_ends.weight"].abs().amax(-1) > 0).all()


def test_two_vectors_are_all_that_is_added() -> None:
    model, plain = thinking(), shared_model()
    assert model.num_parameters() == plain.num_parameters() + 2 * 32 == count_parameters(model.config).total


@torch.no_grad()
def test_generated_thoughts_are_those_of_a_whole_pass() -> None:
    model = tiny_model(thought_length=2, eos_token_id=None)
    prompt = tokens("xxxx")
    schedule = ThoughtSchedule(text_tokens=3, num_tokens=4)
    new = model.generate(prompt, max_new_tokens=12, do_sample=False, meta_schedule=schedule)[0, 4:].tolist()
    # the prompt is returned as it was given, and read with its thought
    whole = schedule_meta_tokens(prompt[0].tolist(), schedule, meta_token_id=META) + new
    assert [column for column, token in enumerate(whole) if token == META] == [3, 4, 5, 6, 10, 11, 12, 13, 17, 18, 19]
    logits = model(torch.tensor([whole])).logits[0]
    logits[:, [META, PAD]] = -torch.inf
    best = logits.argmax(-1).tolist()
    chosen = [column for column in range(8, len(whole)) if whole[column] != META]
    assert [best[column - 1] for column in chosen] == [whole[column] for column in chosen]


def test_embeddings_of_thoughts_are_no_subject_of_interventions() -> None:
    model = thinking()
    for intervention in (ZeroEmbedding(), TokenEmbedding(token_id=3)):
        refused = pytest.raises(UsageError, match="expected meta-tokens that are alike, found thought_length 2")
        with refused, intervene(model, intervention):
            pass
    with intervene(model, ZeroPosition()), torch.no_grad():
        model(tokens("x____x"), past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"thought_length": 4}}, "thought_length 4 needs injection.kind thought with injection.length 4"),
        ({"model": {"thought_length": 4}, "injection": {"kind": "thought", "length": 5}}, "thought_length 4 needs"),
        ({"model": {"thought_length": 4, "meta_attention_layers": "none"}}, "thought_length needs meta-attention"),
        ({"model": {"thought_length": 4, "meta_attention_over": "all"}}, "thought_length needs meta-attention"),
    ],
)
def test_thoughts_that_the_injection_does_not_make_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        PretrainConfig.model_validate(changes)


def test_thoughts_whose_tokens_are_alike_need_no_second_attention() -> None:
    model = ModelConfig(meta_attention_layers="none")
    assert PretrainConfig(model=model, injection=ThoughtInjection(length=4)).injection != UniformInjection()
