"""A cache goes in and comes out under both of the names that transformers has had for it."""

import logging

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.model.compatibility import CACHE_NAME, CACHE_NAMES
from tiny_models import META, PAD, VOCAB_SIZE, assert_close, randomize, shared_model, tokens

IDS = tokens("x_xx_x__xxxx", "xxx__xxxx_xx")
START = 8


def wrapped_gpt2() -> PretrainedCausalLM:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    config.meta_token_id, config.pad_token_id, config.loss_policy = META, PAD, "skip"
    return PretrainedCausalLM(randomize(GPT2LMHeadModel(config)).double().eval())


MODELS = {
    "causal_model": lambda: shared_model(dtype=torch.float64),
    "decoder": lambda: shared_model(dtype=torch.float64).model,
    "model_of_transformers": wrapped_gpt2,
    "its_decoder": lambda: wrapped_gpt2().get_decoder(),
}


@pytest.mark.parametrize("returned", CACHE_NAMES)
@pytest.mark.parametrize("given", CACHE_NAMES)
@pytest.mark.parametrize("name", ["causal_model", "decoder", "model_of_transformers"])
@torch.no_grad()
def test_cache_is_returned_and_taken_under_either_name(name: str, given: str, returned: str) -> None:
    model = MODELS[name]()
    cache = getattr(model(IDS[:, :START], use_cache=True), returned)
    assert isinstance(cache, DynamicCache)
    continued = model(IDS[:, START:], use_cache=True, **{given: cache})[0]
    assert_close(continued, model(IDS, use_cache=False)[0][:, START:], 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_two_caches_are_refused(name: str) -> None:
    model, cache = MODELS[name](), DynamicCache(config=shared_model().config)
    with pytest.raises(ValueError, match="past_key_values or as cache, not as both"):
        model(IDS, past_key_values=cache, cache=cache)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_output_without_a_cache_says_so_under_either_name(name: str) -> None:
    assert getattr(shared_model()(IDS, use_cache=False), name) is None


@torch.no_grad()
def test_generation_goes_on_from_a_cache_to_the_tokens_that_it_makes_without(recwarn: pytest.WarningsRecorder) -> None:
    model, options = shared_model(), {"max_new_tokens": 6, "do_sample": False}
    cache = DynamicCache(config=model.config)
    model(IDS[:1, :-1], cache=cache)
    uncached = model.generate(IDS[:1], use_cache=False, **options)
    assert torch.equal(model.generate(IDS[:1], **{CACHE_NAME: cache}, **options), uncached)
    assert torch.equal(model.generate(IDS[:1], **options), uncached)
    assert not recwarn.list


@torch.no_grad()
def test_a_model_and_its_generation_use_no_name_that_transformers_deprecates(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    type(logger).warning_once.cache_clear()  # or what another test has caused would be told no more
    logger.addHandler(caplog.handler)  # transformers' own loggers do not propagate
    try:
        shared_model()(IDS, use_cache=True)
        wrapped_gpt2()(IDS, use_cache=True)
        shared_model().generate(IDS[:1], max_new_tokens=2, do_sample=False, cache_implementation="static")
    finally:
        logger.removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text
