"""Decoding in which meta-tokens ride along gives what `generate` gives, in fewer forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from metatokens.config.loading import is_finetuning, load_preset, preset_names
from metatokens.generation import stepping
from metatokens.generation.stepping import Continuation, Sampler, decode, decode_together, follows_steps
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.schedule import (
    NoSchedule,
    PeriodicSchedule,
    ThoughtSchedule,
    UniformSchedule,
    generate,
    schedule_meta_tokens,
)
from metatokens.training.initialization import build_model

EOS, META = 0, 40
SMALL = ("--model.hidden_size", "16", "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2")


def small(arm: str) -> tuple[str, ...]:
    """Return the options of an arm in two layers."""
    return (*SMALL, "--model.attention.recurrent_layer", "1") if "block-recurrent" in arm else SMALL


ARMS = {  # one of those that have the same model at this size
    str(load_preset(name, small(name)).model): name
    for name in preset_names()
    if name.startswith("tiny/") and not is_finetuning(name) and name not in {"tiny/extend"}
}
SCHEDULES = [
    NoSchedule(),
    PeriodicSchedule(1),
    PeriodicSchedule(3),
    UniformSchedule(0.4, seed=5),
    ThoughtSchedule(text_tokens=3, num_tokens=4),
]
SAMPLINGS = [
    {"temperature": 0.0, "top_k": None, "top_p": None},
    {"temperature": 1.0, "top_k": None, "top_p": None},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
]


@pytest.fixture(scope="module")
def model() -> MetaTokenForCausalLM:
    torch.manual_seed(0)
    config = MetaTokenConfig(
        vocab_size=42,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
        meta_token_id=META,
        pad_token_id=41,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return MetaTokenForCausalLM(config).double().eval()


@contextmanager
def counted_passes(model: MetaTokenForCausalLM) -> Iterator[list[int]]:
    """Note how many positions each forward pass reads."""
    passes: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    yield passes
    handle.remove()


def by_generate(model, prompt_ids, schedule, sampling, num_new):
    top_k, top_p = sampling["top_k"] or 0, sampling["top_p"] or 1.0
    how = {"do_sample": sampling["temperature"] > 0, "max_new_tokens": num_new}
    if how["do_sample"]:
        how |= {"temperature": sampling["temperature"], "top_k": top_k, "top_p": top_p}
    torch.manual_seed(7)
    inputs = torch.tensor([prompt_ids])
    found = generate(
        model=model, input_ids=inputs, attention_mask=torch.ones_like(inputs), meta_schedule=schedule, **how
    )
    return found[0, len(prompt_ids) :].tolist()


def by_steps(model, prompt_ids, schedule, sampling, num_new):
    found: list[int] = []
    sampler = Sampler(**sampling, suppressed=model._ids_never_sampled(), device="cpu")
    torch.manual_seed(7)
    decode(
        *(model, prompt_ids),
        schedule=schedule,
        num_new=num_new,
        eos_token_id=EOS,
        sampler=sampler,
        emit=found.append,
    )
    return found


def by_steps_together(model, prompts, schedule, sampling, num_new, cache=None):
    found: list[list[int]] = [[] for _ in prompts]
    wanted = []
    for prompt, its_own, num in zip(prompts, found, num_new, strict=True):
        generator = torch.Generator().manual_seed(7)
        sampler = Sampler(**sampling, suppressed=model._ids_never_sampled(), device="cpu", generator=generator)
        wanted.append(Continuation(prompt, num, sampler, its_own.append))
    decode_together(model, wanted, schedule=schedule, eos_token_id=EOS, cache=cache)
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_the_text_is_that_of_generate(model, schedule, sampling) -> None:
    for seed in range(3):  # as many lengths as the longer period has places
        text = torch.randint(1, META, (6 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        prompt = schedule_meta_tokens(text, schedule, meta_token_id=META)
        for num_new in (1, 2, 13):
            expected = by_generate(model, prompt, schedule, sampling, num_new)
            assert by_steps(model, prompt, schedule, sampling, num_new) == expected


@pytest.mark.parametrize("arm", ARMS.values())
def test_every_arm_continues_beyond_its_windows_and_blocks_as_by_generate(arm: str) -> None:
    config = load_preset(arm, small(arm)).model
    model = build_model(config, text_vocab_size=META, eos_token_id=EOS, seed=0).double().eval()
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():  # random weights that do not just repeat the last token
        for weight in (weight for weight in model.parameters() if weight.ndim > 1):
            weight.copy_(torch.randn(weight.shape, generator=draws) / 2)
        head = torch.randn(model.lm_head.weight.shape, generator=draws, dtype=torch.float64)
        model.lm_head.weight = torch.nn.Parameter(head)
    # 120 positions, and 20 more: beyond a window of 64, and across the third end of a block of 46
    prompt = schedule_meta_tokens((list(range(1, META)) * 3)[:90], SCHEDULES[2], meta_token_id=META)
    expected = by_generate(model, prompt, SCHEDULES[2], SAMPLINGS[1], 20)
    assert by_steps(model, prompt, SCHEDULES[2], SAMPLINGS[1], 20) == expected
    assert len(set(expected)) > 2
    shorter = [prompt[:5], prompt[:-2]]
    alone = [by_steps(model, one, SCHEDULES[2], SAMPLINGS[1], 20) for one in shorter]
    assert by_steps_together(model, [prompt, *shorter], SCHEDULES[2], SAMPLINGS[1], [20] * 3) == [expected, *alone]


def test_meta_tokens_take_no_pass_of_their_own(model) -> None:
    prompt = [1, 2, 3, META, 4, 5, 6]  # a meta-token is due right behind it
    with counted_passes(model) as passes:
        found = by_steps(model, prompt, PeriodicSchedule(3), SAMPLINGS[0], num_new=9)
    assert [token == META for token in found] == [True, False, False, False, True, False, False, False, True]
    assert passes == [8, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_ragged_prompts_are_continued_together_as_each_alone(model, schedule, monkeypatch) -> None:
    monkeypatch.setattr(stepping, "PREFILL_POSITIONS", 4)  # a part of the longest prompt is padding in the others
    draws = torch.Generator().manual_seed(3)
    texts = [torch.randint(1, META, (length,), generator=draws).tolist() for length in (11, 1, 6, 6)]
    prompts = [schedule_meta_tokens(text, schedule, meta_token_id=META) for text in texts]
    num_new = [30, 9, 30, 1]  # some end before the others, and some by an end of text
    for sampling in SAMPLINGS:
        alone = [by_steps(model, prompt, schedule, sampling, num) for prompt, num in zip(prompts, num_new, strict=True)]
        with counted_passes(model) as passes:
            assert by_steps_together(model, prompts, schedule, sampling, num_new) == alone
        assert len(passes) <= 30 + 4


@pytest.mark.parametrize("num_new", [[0, 3], [3, 0], [2, 3], [0, 0]])
@pytest.mark.parametrize("num_before", [0, 5])
def test_rows_of_a_given_cache_go_with_their_continuations(model, num_new, num_before) -> None:
    texts = [[*range(1, 9)], [*range(20, 28)]]
    cache = DynamicCache(config=model.config)
    if num_before:
        with torch.no_grad():
            model(torch.tensor([text[:num_before] for text in texts]), past_key_values=cache, use_cache=True)
    rest = [text[num_before:] for text in texts]
    alone = [by_steps(model, text, NoSchedule(), SAMPLINGS[0], num) for text, num in zip(texts, num_new, strict=True)]
    assert by_steps_together(model, rest, NoSchedule(), SAMPLINGS[0], num_new, cache) == alone


def test_a_long_prompt_is_read_in_parts(model, monkeypatch) -> None:
    text = list(range(1, 30))
    whole = by_steps(model, text, NoSchedule(), SAMPLINGS[0], 5)
    monkeypatch.setattr(stepping, "PREFILL_POSITIONS", 8)
    with counted_passes(model) as passes:
        assert by_steps(model, text, NoSchedule(), SAMPLINGS[0], 5) == whole
    assert passes == [8, 8, 8, 5, 1, 1, 1, 1]


def test_settings_that_are_not_followed_leave_the_way_of_generate(model) -> None:
    assert follows_steps(model)
    model.generation_config.repetition_penalty = 1.2
    assert not follows_steps(model)
    model.generation_config.repetition_penalty = None
    assert follows_steps(model)
