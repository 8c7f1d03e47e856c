"""`generate` of transformers on the model: every decoding strategy, and never a meta-token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from metatokens.config.schema import ExplicitInjection
from metatokens.data.collator import MetaTokenCollator
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from tiny_models import EOS, MAX_LENGTH, META, PAD, attention_mask_of, tiny_model, tokens

PROMPTS = tokens("x_xx_xx", "xxxxxxx", "___xxxx")
NUM_NEW = 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 2},
}


def eager_for_meta_tokens(**changes: Any) -> MetaTokenForCausalLM:
    """Return a model that gives the meta-token and padding by far the largest logits everywhere."""
    model = tiny_model(tie_word_embeddings=False, dtype=torch.float64, **changes)
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[[META, PAD]] = 10
    return model


def generate(model: MetaTokenForCausalLM, prompts: Tensor = PROMPTS, **options: Any) -> Tensor:
    """Return the new tokens of each row; the end of a text ends nothing here."""
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, **options}
    generated = model.generate(prompts, attention_mask=attention_mask_of(prompts), **options)
    return generated[:, prompts.shape[1] :]


class Unbanned(MetaTokenForCausalLM):
    def _ids_never_sampled(self) -> list[int]:
        return []


def is_banned(ids: Tensor) -> Tensor:
    return (ids == META) | (ids == PAD)


def test_greedy_without_the_ban_would_emit_the_meta_token_or_padding() -> None:
    # otherwise the tests below could not fail
    assert is_banned(generate(eager_for_meta_tokens(model_class=Unbanned), do_sample=False)).all()


@pytest.mark.parametrize("own", [None, [], [3, 5]])
@pytest.mark.parametrize("as_config", [False, True])
def test_a_callers_own_suppressed_tokens_are_added_to_the_ban(own: list[int] | None, as_config: bool) -> None:
    model = eager_for_meta_tokens()
    with torch.no_grad():
        model.lm_head.weight[3] = 9  # what comes first after the ban
    options = {"suppress_tokens": own, "do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    generated = generate(model, **({"generation_config": GenerationConfig(**options)} if as_config else options))
    assert not is_banned(generated).any()
    assert (generated == 3).any() == (3 not in (own or ()))
    assert model.generation_config.suppress_tokens == [META, PAD]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generation_never_emits_the_meta_token_nor_padding(strategy: str) -> None:
    torch.manual_seed(0)
    generated = generate(eager_for_meta_tokens(), **STRATEGIES[strategy])
    assert generated.shape == (len(PROMPTS), NUM_NEW)
    assert not is_banned(generated).any()


def test_assisted_generation_never_emits_the_meta_token() -> None:
    assistant = eager_for_meta_tokens(seed=1)
    generated = generate(eager_for_meta_tokens(), PROMPTS[:1], do_sample=False, assistant_model=assistant)
    assert not is_banned(generated).any()


def test_left_padded_batch_never_emits_the_meta_token() -> None:
    assert not is_banned(generate(eager_for_meta_tokens(), tokens("...x_xx", "x_xxx_x"), do_sample=False)).any()


def test_loaded_model_still_never_emits_the_meta_token(tmp_path: Path) -> None:
    save_model(eager_for_meta_tokens(), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).suppress_tokens == [META, PAD]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_banned(generate(loaded, do_sample=False)).any()


def prefers(token: int, **changes: Any) -> MetaTokenForCausalLM:
    """Return a model whose likeliest token is this one everywhere."""
    model = tiny_model(tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[token] = 10
    return model


ADDED = PAD + 1  # a row of the padded vocabulary, as a tokenizer gives to a token that its user adds


def test_token_that_a_user_added_ends_a_text() -> None:
    generated = prefers(ADDED).generate(PROMPTS[:1], max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=ADDED)
    assert generated[0, PROMPTS.shape[1] :].tolist() == [ADDED]


def test_token_in_a_row_that_resizing_added_is_generated() -> None:
    model = prefers(ADDED)
    model.resize_token_embeddings(30)
    with torch.no_grad():
        model.lm_head.weight[29] = 20
    assert (generate(model, do_sample=False) == 29).all()


def test_checkpoint_keeps_a_ban_of_the_users_own(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.suppress_tokens = [3, META, PAD]
    save_model(model, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.suppress_tokens == [3, META, PAD]


def test_meta_token_of_id_zero_bans_itself_and_padding_alone() -> None:
    model = prefers(5, meta_token_id=0)
    assert model.generation_config.suppress_tokens == [0, PAD]
    assert (generate(model, do_sample=False) == 5).all()


def test_meta_token_that_is_named_as_an_end_of_text_stays_banned() -> None:
    ends = [EOS, META]
    generated = prefers(META, eos_token_id=ends).generate(
        PROMPTS[:1], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, eos_token_id=ends
    )
    assert not is_banned(generated[0, PROMPTS.shape[1] :]).any()


@pytest.mark.parametrize("where", ["config", "call"])
def test_padding_that_is_also_an_end_of_text_ends_a_text(where: str) -> None:
    model = prefers(PAD, **({"eos_token_id": [19, PAD]} if where == "config" else {}))
    ends = {"eos_token_id": PAD} if where == "call" else {}
    generated = model.generate(PROMPTS[:1], max_new_tokens=NUM_NEW, do_sample=False, **ends)
    assert generated[0, PROMPTS.shape[1] :].tolist() == [PAD]


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 2},
    "several sequences": {"num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_collators_whole_batch_generates_as_its_ids_and_mask_do(way: str) -> None:
    model = tiny_model(dtype=torch.float64)
    collator = MetaTokenCollator(ExplicitInjection(positions=(0, 4)), meta_token_id=META, pad_token_id=PAD)
    batch = collator([{"input_ids": list(range(1, 8))}, {"input_ids": list(range(5, 12))}])
    assert "meta_indices" in batch
    side = {"shift_labels": batch["labels"], "num_items_in_batch": torch.tensor(3)}
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False, **WAYS[way]}
    expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(model.generate(**batch, **side, **options), expected)


@pytest.mark.parametrize("way", ["dynamic cache", "static cache", "beams"])
@pytest.mark.parametrize("given", ["meta_indices", "bool mask", "integer mask"])
def test_embeddings_with_their_meta_tokens_told_in_any_form_generate_as_their_ids_do(given: str, way: str) -> None:
    model = tiny_model(dtype=torch.float64)
    prompts = tokens("x_xx_xx", "xx_xxx_")
    is_meta = prompts == META
    told: dict[str, dict[str, Tensor]] = {
        "meta_indices": {"meta_indices": is_meta.nonzero()[:, 1].view(2, 2)},
        "bool mask": {"meta_token_mask": is_meta},
        "integer mask": {"meta_token_mask": is_meta.long()},
    }
    options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False, **WAYS[way]}
    embeds = model.get_input_embeddings()(prompts)
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(prompts), **told[given], **options
    )
    assert torch.equal(from_embeds, generate(model, prompts, **options))


def test_assisted_generation_from_a_collators_batch_equals_that_from_ids() -> None:
    model, assistant = tiny_model(dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64)
    batch = {"input_ids": tokens("x_xx_x"), "meta_indices": torch.tensor([[1, 4]]), "labels": tokens("xxxxxx")}
    batch["meta_token_mask"] = batch["input_ids"] == META
    assisted = model.generate(**batch, max_new_tokens=NUM_NEW, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, model.generate(batch["input_ids"], max_new_tokens=NUM_NEW, do_sample=False))


@torch.no_grad()
def test_integer_meta_token_mask_gives_the_bits_and_the_loss_of_a_bool_one() -> None:
    for policy in ("skip", "retarget"):
        model, is_meta = tiny_model(loss_policy=policy), PROMPTS == META
        bools, integers = (
            model(inputs_embeds=model.get_input_embeddings()(PROMPTS), labels=PROMPTS, meta_token_mask=mask)
            for mask in (is_meta, is_meta.long())
        )
        assert torch.equal(bools.logits, integers.logits)
        assert torch.equal(bools.loss, integers.loss)


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
def test_a_minimum_beyond_the_model_is_an_error_that_names_both_lengths(
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


@pytest.mark.parametrize("asked", [{"max_new_tokens": 9}, {"max_length": 99}, {"max_length": 99, "num_beams": 2}])
@pytest.mark.parametrize("given", ["ids", "embeddings", "both"])
def test_a_maximum_beyond_the_model_stops_at_its_end_with_a_warning(given: str, asked: dict[str, int]) -> None:
    model = tiny_model(eos_token_id=None)
    prompts = tokens("x" * (MAX_LENGTH - 3))
    inputs = {"input_ids": prompts, "inputs_embeds": model.get_input_embeddings()(prompts)}
    left_out = {"ids": "inputs_embeds", "embeddings": "input_ids"}.get(given)
    inputs = {name: value for name, value in inputs.items() if name != left_out}
    with pytest.warns(UserWarning, match=r"stops after 4 of at most \d+ new tokens, at the end of the model's 64"):
        generated = model.generate(**inputs, attention_mask=torch.ones_like(prompts), do_sample=False, **asked)
    assert generated.shape[1] == (4 if given == "embeddings" else MAX_LENGTH + 1)


def test_prompt_longer_than_the_model_is_refused_before_a_token_is_made() -> None:
    with pytest.raises(ValueError, match="65 positions is longer than the model's 64"):
        tiny_model().generate(tokens("x" * (MAX_LENGTH + 1)), max_new_tokens=3)


def test_padding_takes_no_room_of_the_window() -> None:
    prompt = tokens("x_xx" * 10)
    padded = torch.nn.functional.pad(prompt, (MAX_LENGTH // 2, 0), value=PAD)
    model = tiny_model()
    assert torch.equal(generate(model, padded, do_sample=False), generate(model, prompt, do_sample=False))


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
    assert not is_banned(samples).any()


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


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with the ids of the tiny models whose text tokens are letters: id 0 is a, id 1 is b."""
    letters = {chr(ord("a") + i): i for i in range(EOS)}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "<end>": EOS, "_PAUSE_": META, "<pad>": PAD}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


class Script(LogitsProcessor):
    """Forces one row of tokens per row of the batch, after a prompt of three."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = torch.tensor(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = self.rows[:, input_ids.shape[1] - 3, None]
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)


@pytest.mark.parametrize(
    ("script", "stopped"),
    [
        ([5, 0, META, 1, 6, 6], [5, 0, META, 1]),  # a meta-token inside "ab"
        ([0, META, META, 1, 6, 6], [0, META, META, 1]),
        ([0, 1, META, 6, 6, 6], [0, 1]),
        ([META, 6, 6, 0, 5, 1], [META, 6, 6, 0, 5, 1]),  # the prompt ends with the string: that stops nothing
    ],
)
def test_stop_string_is_found_in_the_text_between_meta_tokens(
    script: list[int], stopped: list[int], words: PreTrainedTokenizerFast
) -> None:
    prompt = torch.tensor([[7, 0, 1]])
    generated = tiny_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        stop_strings=["ab"],
        tokenizer=words,
        logits_processor=LogitsProcessorList([Script(script)]),
    )
    assert generated[0, 3:].tolist() == stopped
