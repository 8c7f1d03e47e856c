"""Packed meta-attention is the paper's dense definition (section 3), in value and in every gradient."""

import copy
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metatokens.model import MetaTokenForCausalLM
from metatokens.model.reference import DenseReferenceForCausalLM
from pairwise import all_pairs
from tiny_models import (
    BACKENDS,
    ENCODINGS,
    MEMBERS,
    META,
    NUM_TERMS,
    PAD,
    assert_close,
    attention_mask_of,
    gradients,
    tiny_model,
    tokens,
)
from tolerances import assert_as_near, tolerance

LAYOUTS = {
    "no_meta_token": ("xxxxxxxxx", "xxxxxxxxx"),
    "meta_tokens_only": ("_________", "_________"),
    "equal_counts": ("x_xxx_xxx", "xxx__xxxx"),
    "ragged_counts": ("x_x_x_xx_", "xxxxxx_xx"),
    "row_without_meta_tokens": ("xxxxxxxxx", "_xx__xxx_"),
    "right_padding": ("x_xx_xx..", "_xxxxxx__"),
    "left_padding": ("...x_x_xx", "xx_xxxx_x"),
    "padding_on_both_sides_and_ragged": ("..xx_xx..", "_________", "xxxxxxxxx", ".xxxxx_x_"),
}
EVERY_KIND_OF_ROW = LAYOUTS["padding_on_both_sides_and_ragged"]


@cache
def pair(
    encoding: str, backend: str, dtype: torch.dtype, over: str = "meta"
) -> tuple[MetaTokenForCausalLM, MetaTokenForCausalLM]:
    shape = {"position_encoding": encoding, "attn_implementation": backend, "dtype": dtype, **MEMBERS[over]}
    packed = tiny_model(**shape)
    dense = tiny_model(**shape, model_class=DenseReferenceForCausalLM)
    dense.load_state_dict(packed.state_dict())
    return packed, dense


def run(
    model: MetaTokenForCausalLM, ids: Tensor, meta_indices: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the real tokens and the gradients of a loss in which each logit has its own weight."""
    model.zero_grad(set_to_none=True)
    attention_mask = attention_mask_of(ids) if (ids == PAD).any() else None
    logits = model(ids, attention_mask=attention_mask, meta_indices=meta_indices).logits[ids != PAD]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    return logits.detach(), gradients(model)


def assert_equal_to_dense(
    ids: Tensor,
    *,
    encoding: str,
    backend: str,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    meta_indices: Tensor | None = None,
    over: str = "meta",
) -> None:
    packed, dense = pair(encoding, backend, dtype, over)
    logits, packed_gradients = run(packed, ids, meta_indices)
    expected, dense_gradients = run(dense, ids)
    assert_close(logits, expected, tolerance)
    for name, gradient in dense_gradients.items():
        # without any meta-token the packed form skips the meta-attention, and its gradients are absent zeros
        actual = packed_gradients.get(name, torch.zeros_like(gradient))
        scale = gradient.abs().max().clamp(min=1)  # a gradient sums over all tokens, and so do its rounding errors
        assert_close(actual / scale, gradient / scale, tolerance)
    assert packed_gradients.keys() <= dense_gradients.keys()


@all_pairs(layout=LAYOUTS, encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
def test_packed_equals_dense_to_1e_10_in_float64(layout: str, encoding: str, backend: str, over: str) -> None:
    assert_equal_to_dense(tokens(*LAYOUTS[layout]), encoding=encoding, backend=backend, over=over)


@all_pairs(encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
def test_packed_equals_dense_in_float32_but_for_rounding(encoding: str, backend: str, over: str) -> None:
    assert_equal_to_dense(
        tokens(*EVERY_KIND_OF_ROW),
        encoding=encoding,
        backend=backend,
        over=over,
        dtype=torch.float32,
        tolerance=tolerance(torch.float32, NUM_TERMS),
    )


@all_pairs(encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
def test_packed_in_bfloat16_is_as_near_to_the_exact_dense_form_as_dense_in_bfloat16(
    encoding: str, backend: str, over: str
) -> None:
    ids = tokens(*EVERY_KIND_OF_ROW)
    packed, dense = pair(encoding, backend, torch.bfloat16, over)
    exact = copy.deepcopy(dense).double()  # of the same weights, which bfloat16 has rounded
    (logits, packed_gradients), (dense_logits, dense_gradients) = run(packed, ids), run(dense, ids)
    expected, exact_gradients = run(exact, ids)
    assert_as_near(logits, dense_logits, expected)
    scales = {name: gradient.abs().max().clamp(min=1) for name, gradient in exact_gradients.items()}
    assert_as_near(
        *(
            torch.cat([(gradients_of[name] / scale).flatten() for name, scale in scales.items()])
            for gradients_of in (packed_gradients, dense_gradients, exact_gradients)
        )
    )


@st.composite
def random_layouts(draw: st.DrawFn) -> Tensor:
    """Draw rows of any mixture of text and meta-tokens, with padding on either side or none."""
    length = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left))
        kinds = draw(st.lists(st.sampled_from("x_"), min_size=length - left - right, max_size=length - left - right))
        rows.append("." * left + "".join(kinds) + "." * right)
    return tokens(*rows, seed=draw(st.integers(0, 1000)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    ids=random_layouts(),
    encoding=st.sampled_from(ENCODINGS),
    backend=st.sampled_from(BACKENDS),
    over=st.sampled_from(sorted(MEMBERS)),
)
def test_packed_equals_dense_for_random_layouts(ids: Tensor, encoding: str, backend: str, over: str) -> None:
    assert_equal_to_dense(ids, encoding=encoding, backend=backend, over=over)


@all_pairs(rows=[("x_xxx_xxx", "xxx__xxxx"), ("___", "___"), ("xxx_", "_xxx")], encoding=ENCODINGS, backend=BACKENDS)
def test_packed_with_meta_indices_given_equals_dense(rows: tuple[str, ...], encoding: str, backend: str) -> None:
    ids = tokens(*rows)
    meta_indices = (ids == META).nonzero()[:, 1].view(len(ids), -1)
    assert_equal_to_dense(ids, encoding=encoding, backend=backend, meta_indices=meta_indices)


def test_packed_equals_dense_when_only_some_layers_have_meta_attention() -> None:
    ids = tokens("x_xx_x_", "xxxx_xx")
    shape = {"num_hidden_layers": 3, "meta_attention_layers": [1]}
    packed, dense = tiny_model(**shape), tiny_model(**shape, model_class=DenseReferenceForCausalLM)
    assert_close(run(packed, ids)[0], run(dense, ids)[0], 1e-10)


def test_meta_attention_moves_the_logits_that_these_tests_compare() -> None:
    ids = tokens("x_xx_x_")
    model = tiny_model()
    ignored = model(ids, meta_token_mask=torch.zeros_like(ids, dtype=torch.bool)).logits
    assert (model(ids).logits - ignored).abs().max() > 0.1
