"""Documents packed into one row are each document alone: in logits, in gradients, in both attentions.

Packing is told by positions that start anew, as `DataCollatorWithFlattening` makes them, by `cu_seq_lens_q`, or by a
mask of pairs.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from baseline_models import BASELINES, baseline_model
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.reference import DenseReferenceForCausalLM
from pairwise import all_pairs
from tiny_models import (
    BACKENDS,
    ENCODINGS,
    MEMBERS,
    META,
    assert_close,
    attention_mask_of,
    gradients,
    tiny_model,
    tokens,
)

DOCUMENTS = ("x_xx_x", "_xx_", "xxx", "x", "xx__x_x")
TOLERANCE = 1e-10  # in float64


def documents() -> list[Tensor]:
    return [tokens(picture, seed=number) for number, picture in enumerate(DOCUMENTS)]


def positions_of(parts: list[Tensor]) -> Tensor:
    """Return the positions (1, T) of documents in one row, each from 0."""
    return torch.cat([torch.arange(part.shape[1]) for part in parts])[None]


def pairs_of(parts: list[Tensor]) -> Tensor:
    """Return the causal mask (1, 1, T, T) bool within documents."""
    return torch.block_diag(*(torch.ones(part.shape[1], part.shape[1]).tril() for part in parts)).bool()[None, None]


def told_by(way: str, parts: list[Tensor]) -> dict[str, Any]:
    """Return what tells of the documents, in each way that there is."""
    position_ids, pairs = positions_of(parts), pairs_of(parts)
    if way == "positions":
        return {"position_ids": position_ids}
    if way == "cu_seq_lens":
        lengths = torch.tensor([0, *(part.shape[1] for part in parts)])
        bounds = lengths.cumsum(0).to(torch.int32)
        return {"position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    additive = torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, -torch.inf)
    masks = {"bool_pairs": pairs, "integer_pairs": pairs.long(), "additive_pairs": additive}
    return {"position_ids": position_ids, "attention_mask": masks[way]}


WAYS = ("positions", "cu_seq_lens", "bool_pairs", "integer_pairs", "additive_pairs")


def run(model: MetaTokenForCausalLM, parts: list[Tensor], inputs: dict[str, Any] | None) -> Any:
    """Return the logits of all documents, and the gradients of a sum of the logits with weights of their own.

    `inputs` tell of the documents in one row; None means each alone.
    """
    model.zero_grad(set_to_none=True)
    if inputs is None:
        logits = torch.cat([model(part).logits for part in parts], dim=1)
    else:
        logits = model(torch.cat(parts, dim=1), **inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), gradients(model)


@all_pairs(way=WAYS, encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
def test_documents_in_one_row_equal_each_alone(way: str, encoding: str, backend: str, over: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=backend, dtype=torch.float64, **MEMBERS[over])
    parts = documents()
    expected, expected_gradients = run(model, parts, None)
    logits, packed_gradients = run(model, parts, told_by(way, parts))
    assert_close(logits, expected, TOLERANCE)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1)
        assert_close(packed_gradients[name] / scale, gradient / scale, TOLERANCE)


@pytest.mark.parametrize("encoding", ["rope", "alibi", "t5"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_dense_definition_keeps_documents_apart_in_the_same_ways(way: str, encoding: str) -> None:
    shape = {"position_encoding": encoding, "attn_implementation": "eager", "dtype": torch.float64}
    dense = tiny_model(**shape, model_class=DenseReferenceForCausalLM)
    parts = documents()
    ids, inputs = torch.cat(parts, dim=1), told_by(way, parts)
    assert_close(dense(ids, **inputs).logits, tiny_model(**shape)(ids, **inputs).logits, TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_collators_indices_change_nothing_about_packed_documents(way: str) -> None:
    model = tiny_model(dtype=torch.float64)
    parts = documents()
    ids = torch.cat(parts, dim=1)
    meta_indices = (ids == META).nonzero()[:, 1][None]
    inputs = told_by(way, parts)
    assert_close(model(ids, meta_indices=meta_indices, **inputs).logits, model(ids, **inputs).logits, TOLERANCE)


@torch.no_grad()
def test_rows_with_other_documents_each_are_kept_apart_by_their_own_positions() -> None:
    model = tiny_model(dtype=torch.float64)
    rows = [[tokens("x_xx_x"), tokens("_xx_x_", seed=1)], [tokens("xx_", seed=2), tokens("_x__xxx__", seed=3)]]
    rows.append([tokens("x__xx_xx_xxx", seed=4)])
    ids = torch.cat([torch.cat(parts, dim=1) for parts in rows])
    position_ids = torch.cat([positions_of(parts) for parts in rows])
    expected = torch.cat([torch.cat([model(part).logits for part in parts], dim=1) for parts in rows])
    assert_close(model(ids, position_ids=position_ids).logits, expected, TOLERANCE)


@torch.no_grad()
def test_a_mask_of_pairs_binds_meta_attention_over_a_cache_as_without_one() -> None:
    # two documents whose second goes on in a later call
    for encoding in ("rope", "alibi"):
        model = tiny_model(position_encoding=encoding, dtype=torch.float64)
        parts = [tokens("x_xx_x"), tokens("_xx_x_", seed=1)]
        ids, positions, pairs = torch.cat(parts, dim=1), positions_of(parts), pairs_of(parts)
        cache = DynamicCache(config=model.config)
        pieces = [
            model(
                ids[:, start:stop],
                position_ids=positions[:, start:stop],
                attention_mask=pairs[:, :, start:stop, :stop],
                past_key_values=cache,
            ).logits
            for start, stop in ((0, 8), (8, 11), (11, 12))
        ]
        assert_close(torch.cat(pieces, dim=1), torch.cat([model(part).logits for part in parts], dim=1), TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_an_additive_mask_weighs_the_scores_of_both_attentions(backend: str) -> None:
    shape = {"attn_implementation": backend, "dtype": torch.float64}
    ids = tokens("x_xx_x__x")
    bias = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = bias.masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    packed, dense = tiny_model(**shape), tiny_model(**shape, model_class=DenseReferenceForCausalLM)
    assert_close(packed(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits, TOLERANCE)
    assert (packed(ids, attention_mask=mask).logits - packed(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_left_padding_is_not_taken_for_documents() -> None:
    model = tiny_model(dtype=torch.float64)
    ids = tokens("...x_xx_", "x_xxxx_x")
    mask = attention_mask_of(ids)
    for filler in (0, 1):  # transformers' own fillers
        position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
        given = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=True)
        assert_close(given.logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], TOLERANCE)
        assert given.past_key_values is not None


@torch.no_grad()
def test_packed_documents_fill_a_window_each_and_no_cache() -> None:
    model = tiny_model(max_position_embeddings=8, dtype=torch.float64)
    parts = [tokens("x_xx_xx_", seed=seed) for seed in range(3)]
    outputs = model(torch.cat(parts, dim=1), position_ids=positions_of(parts))
    assert_close(outputs.logits, torch.cat([model(part).logits for part in parts], dim=1), TOLERANCE)
    assert outputs.past_key_values is None
    too_long = torch.cat([torch.arange(9), torch.arange(3)])[None]
    with pytest.raises(ValueError, match="9 positions is longer than the model's 8"):
        model(tokens("x" * 12), position_ids=too_long)


@torch.no_grad()
def test_padding_beyond_the_window_takes_no_positions() -> None:
    model = tiny_model(max_position_embeddings=8, dtype=torch.float64)
    row = tokens("x_xx_xx_")
    ids = torch.cat([tokens("...."), row], dim=1)
    assert_close(model(ids, attention_mask=attention_mask_of(ids)).logits[:, 4:], model(row).logits, TOLERANCE)


def test_packed_documents_with_a_cache_are_refused() -> None:
    model = tiny_model()
    parts = documents()
    with pytest.raises(ValueError, match="a cache cannot keep them apart"):
        model(
            torch.cat(parts, dim=1), position_ids=positions_of(parts), past_key_values=DynamicCache(config=model.config)
        )


@pytest.mark.parametrize("name", BASELINES)
def test_sparse_attentions_refuse_packed_documents(name: str) -> None:
    parts = documents()
    for way in WAYS:
        with pytest.raises(ValueError, match=r"one document a row|full attention|attention_mask as"):
            baseline_model(name)(torch.cat(parts, dim=1), **told_by(way, parts))


@pytest.mark.parametrize("shape", [(12,), (1, 12, 12)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\) or"):
        tiny_model()(tokens("x_xx_xxxx_xx"), attention_mask=torch.ones(shape).bool())


def test_flex_attention_refuses_a_mask_of_pairs() -> None:
    model = tiny_model(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match='"flex_attention" takes no mask of pairs'):
        model(tokens("xx_x"), attention_mask=torch.ones(1, 1, 4, 4).tril().bool())


@pytest.mark.parametrize("way", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("loss_policy", ["skip", "retarget"])
@torch.no_grad()
def test_no_document_predicts_into_the_next(loss_policy: str, way: str) -> None:
    model, parts = tiny_model(loss_policy=loss_policy), documents()
    apart = sum(model(part, labels=part, num_items_in_batch=1).loss for part in parts)
    row = torch.cat(parts, dim=1)
    assert_close(model(row, labels=row, num_items_in_batch=1, **told_by(way, parts)).loss, apart, TOLERANCE)
