"""`generate` of transformers on the model: every decoding strategy, and never a meta-token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from tiny_models import MAX_LENGTH, META, PAD, attention_mask_of, tiny_model, tokens

PROMPTS = tokens("x_xx_xx", "xxxxxxx", "___xxxx")
NUM_NEW = 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
}


def eager_for_meta_tokens(**changes: Any) -> MetaTokenForCausalLM:
    """Return a model that gives the meta-token, padding and the unused ids by far the largest logits everywhere."""
    model = tiny_model(tie_word_embeddings=False, dtype=torch.float64, **changes)
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[META:] = 10
    return model


def generate(model: MetaTokenForCausalLM, prompts: Tensor = PROMPTS, **options: Any) -> Tensor:
    """Return the new tokens of each row; the end of a text ends nothing here."""
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, **options}
    generated = model.generate(prompts, attention_mask=attention_mask_of(prompts), **options)
    return generated[:, prompts.shape[1] :]


class Unbanned(MetaTokenForCausalLM):
    def _ids_never_sampled(self) -> list[int]:
        return []


def test_greedy_without_the_ban_would_emit_the_meta_token_or_what_is_above_it() -> None:
    # otherwise the tests below could not fail
    assert (generate(eager_for_meta_tokens(model_class=Unbanned), do_sample=False) >= META).all()


@pytest.mark.parametrize("own", [None, [], [3, 5]])
@pytest.mark.parametrize("as_config", [False, True])
def test_a_callers_own_suppressed_tokens_are_added_to_the_ban(own: list[int] | None, as_config: bool) -> None:
    model = eager_for_meta_tokens()
    with torch.no_grad():
        model.lm_head.weight[3] = 9  # what comes first after the ban
    options = {"suppress_tokens": own, "do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    generated = generate(model, **({"generation_config": GenerationConfig(**options)} if as_config else options))
    assert (generated < META).all()
    assert (generated == 3).any() == (3 not in (own or ()))
    assert model.generation_config.suppress_tokens == list(range(META, 24))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generation_never_emits_the_meta_token_nor_padding_of_the_vocabulary(strategy: str) -> None:
    torch.manual_seed(0)
    generated = generate(eager_for_meta_tokens(), **STRATEGIES[strategy])
    assert generated.shape == (len(PROMPTS), NUM_NEW)
    assert (generated < META).all()


def test_assisted_generation_never_emits_the_meta_token() -> None:
    assistant = eager_for_meta_tokens(seed=1)
    generated = generate(eager_for_meta_tokens(), PROMPTS[:1], do_sample=False, assistant_model=assistant)
    assert (generated < META).all()


def test_left_padded_batch_never_emits_the_meta_token() -> None:
    assert (generate(eager_for_meta_tokens(), tokens("...x_xx", "x_xxx_x"), do_sample=False) < META).all()


def test_loaded_model_still_never_emits_the_meta_token(tmp_path: Path) -> None:
    save_model(eager_for_meta_tokens(), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [META, PAD, 22, 23]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (generate(loaded, do_sample=False) < META).all()


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_greedy_with_a_cache_equals_greedy_without(encoding: str) -> None:
    model = tiny_model(position_encoding=encoding, dtype=torch.float64)
    cached = generate(model, do_sample=False)
    assert torch.equal(cached, generate(model, do_sample=False, use_cache=False))
    assert len(cached.unique()) > 2


def test_greedy_with_a_static_cache_equals_greedy_with_a_dynamic_one() -> None:
    model = tiny_model(dtype=torch.float64)
    prompts = tokens("...x_xx", "x_xxx_x")
    static = generate(model, prompts, do_sample=False, cache_implementation="static")
    assert torch.equal(static, generate(model, prompts, do_sample=False))


@pytest.mark.parametrize("from_embeds", [False, True])
@pytest.mark.parametrize("cache", ["static", "dynamic", None])
@pytest.mark.parametrize("encoding", ["rope", "learned"])
def test_generation_beyond_the_model_is_an_error_that_names_both_lengths(
    encoding: str, cache: str | None, from_embeds: bool
) -> None:
    model = tiny_model(position_encoding=encoding)
    prompts = tokens("x" * (MAX_LENGTH - 3))
    options: dict[str, Any] = {"do_sample": False, "use_cache": cache is not None, "cache_implementation": cache}
    options["attention_mask"] = torch.ones_like(prompts)
    if from_embeds:
        options["inputs_embeds"] = model.get_input_embeddings()(prompts)
    else:
        options["input_ids"] = prompts
    # the last new token is not read
    assert model.generate(**options, max_new_tokens=4, min_new_tokens=4).shape[1] in (4, MAX_LENGTH + 1)
    with pytest.raises(ValueError, match=f"{MAX_LENGTH + 1} positions is longer than the model's {MAX_LENGTH}"):
        model.generate(**options, max_new_tokens=5, min_new_tokens=5)
    # a refusal leaves nothing behind
    assert model.generate(**options, max_new_tokens=4, min_new_tokens=4).shape[1] in (4, MAX_LENGTH + 1)


def test_each_row_of_a_left_padded_batch_generates_what_it_generates_alone() -> None:
    model = tiny_model(dtype=torch.float64)
    prompts = tokens("...x_xx", "x_xxx_x", "......_")
    together = generate(model, prompts, do_sample=False)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt[prompt != PAD][None], do_sample=False)
        assert torch.equal(row, alone[0])


def test_beam_search_with_a_cache_equals_beam_search_without() -> None:
    model = tiny_model(dtype=torch.float64)
    cached = generate(model, do_sample=False, num_beams=4)
    assert torch.equal(cached, generate(model, do_sample=False, num_beams=4, use_cache=False))


@pytest.mark.parametrize("picture", ["x_xx_xx", "xxxxxxx", "xxxxxx_"])
def test_assisted_generation_equals_greedy(picture: str) -> None:
    # the assistant is often wrong, so the cache is cropped often
    model, assistant = tiny_model(dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64)
    prompt = tokens(picture)
    assisted = generate(model, prompt, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, generate(model, prompt, do_sample=False))


def test_several_samples_of_one_prompt_differ_and_hold_text_only() -> None:
    torch.manual_seed(0)
    samples = generate(tiny_model(), PROMPTS[:1], do_sample=True, num_return_sequences=4)
    assert len(samples.unique(dim=0)) > 1
    assert (samples < META).all()


def test_generation_from_embeddings_is_that_of_text_only() -> None:
    model = tiny_model(dtype=torch.float64)
    text = tokens("xxxxxxx", "xxxxxxx")
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    embeds = model.get_input_embeddings()(text)
    from_embeds = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(text), **options)
    assert torch.equal(from_embeds, generate(model, text, do_sample=False))


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_generation_from_embeddings_with_a_meta_token_mask_equals_that_from_ids(strategy: str) -> None:
    model = tiny_model(dtype=torch.float64)
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, **STRATEGIES[strategy]}
    embeds = model.get_input_embeddings()(PROMPTS)
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(PROMPTS), meta_token_mask=PROMPTS == META, **options
    )
    assert torch.equal(from_embeds, generate(model, **STRATEGIES[strategy]))
