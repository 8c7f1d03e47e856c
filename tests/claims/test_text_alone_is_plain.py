"""Without a meta-token in the input, meta-attention changes no bit: the plain model is the same function."""

import pytest
import torch

from metatokens.model import MetaTokenForCausalLM
from tiny_models import ENCODINGS, assert_close, attention_mask_of, gradients, tiny_model, tokens

TEXT = ("xxxxxxxxx", "xxxxxxxxx")


def twins(encoding: str, backend: str) -> tuple[MetaTokenForCausalLM, MetaTokenForCausalLM]:
    """Return a model with meta-attention and the plain one with its other weights."""
    shape = {"position_encoding": encoding, "attn_implementation": backend, "dtype": torch.float32}
    model, plain = tiny_model(**shape), tiny_model(**shape, meta_attention_layers="none", seed=1)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all(".meta_attn." in name for name in unexpected)
    return model, plain


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_logits_without_meta_tokens_equal_the_bits_of_the_plain_model(encoding: str, backend: str) -> None:
    model, plain = twins(encoding, backend)
    ids = tokens(*TEXT)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padded_logits_without_meta_tokens_equal_the_bits_of_the_plain_model(encoding: str) -> None:
    model, plain = twins(encoding, "sdpa")
    ids = tokens("...xxxxxx", "xxxxxxxx.")
    mask = attention_mask_of(ids)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_training_step_without_meta_tokens_equals_the_bits_of_the_plain_model(encoding: str, backend: str) -> None:
    model, plain = twins(encoding, backend)
    ids = tokens(*TEXT)
    losses = []
    for each in (model.train(), plain.train()):
        loss = each(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    of_model = gradients(model)
    for name, gradient in gradients(plain).items():
        assert torch.equal(of_model[name], gradient), name


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_training_without_meta_tokens_gives_meta_parameters_zero_gradients_and_not_none(backend: str) -> None:
    model, _ = twins("rope", backend)
    ids = tokens(*TEXT)
    model.train()(ids, labels=ids).loss.backward()
    meta = {name: p.grad for name, p in model.named_parameters() if ".meta_attn." in name}
    assert len(meta) == 2 * 4 * 2  # layers, projections, weight and bias
    for name, gradient in meta.items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_meta_tokens_without_meta_attention_are_pause_tokens() -> None:
    # the plain model reads a meta-token as one more token of its vocabulary
    _, plain = twins("rope", "sdpa")
    with_meta, without = tokens("x_xx"), tokens("xxxx")
    with torch.no_grad():
        assert not torch.equal(plain(with_meta).logits[:, 2:], plain(without).logits[:, 2:])
        assert_close(plain(with_meta).logits[:, :1], plain(without).logits[:, :1], 1e-6)
