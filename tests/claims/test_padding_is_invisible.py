"""A row gives the same logits alone and in a batch, whatever the padding and the meta-tokens of the other rows."""

import pytest
import torch

from tiny_models import ENCODINGS, assert_close, attention_mask_of, tiny_model, tokens

BATCHES = {
    "left": (".....x_xx_", "x_xx_x__xx", "...xxxxxxx"),
    "right": ("x_xx_.....", "x_xx_x__xx", "xxxxxxx..."),
    "mixed": ("..x_x__...", "xxxxxx_xxx", "_________."),
    "mixed_counts_of_meta_tokens": ("xxxxxxxxxx", "x_xxxxxxxx", "__________", "x_x_x_x_x_"),
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_each_row_of_a_mixed_batch_equals_the_row_alone(batch: str, encoding: str, backend: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=backend, dtype=torch.float64)
    ids = tokens(*BATCHES[batch])
    mask = attention_mask_of(ids)
    together = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert_close(together[row, real], alone, 1e-10)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_row_of_padding_only_leaves_logits_and_gradients_finite(encoding: str, backend: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=backend).train()
    ids = tokens("x_xx_x", "......")
    mask = attention_mask_of(ids)
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(ids, attention_mask=mask).logits.isfinite().all()


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny_model(dtype=torch.float64)
    padded, garbage = tokens("..x_xx.", "x_x_x_x"), tokens("x_x_xx_", "x_x_x_x")
    garbage[padded != padded[0, 0]] = padded[padded != padded[0, 0]]
    mask = attention_mask_of(padded)
    expected = model(padded, attention_mask=mask).logits[mask.bool()]
    assert_close(model(garbage, attention_mask=mask).logits[mask.bool()], expected, 1e-10)
