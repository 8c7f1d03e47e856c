"""One schedule of meta-tokens under `generate`: what it inserts, what it returns, and where it is stated."""

import json
import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    StoppingCriteria,
)

from metatokens.data.keyed_random import hash_key
from metatokens.model import MetaTokenForCausalLM, schedule
from metatokens.model.export import CUSTOM_GENERATE, REMOTE_CODE, save_model
from metatokens.model.schedule import (
    MetaTokenSchedule,
    NoSchedule,
    PeriodicSchedule,
    UniformSchedule,
    read_schedule,
    schedule_meta_tokens,
    state_schedule,
)
from tiny_models import EOS, META, PAD, attention_mask_of, tiny_model, tokens

EVERY_3 = PeriodicSchedule(3)
SCHEDULES = [EVERY_3, UniformSchedule(0.4, 5)]
PROMPT = tokens("xxxxxxx")


@pytest.fixture
def model() -> MetaTokenForCausalLM:
    """Return a model whose texts have no end."""
    return tiny_model(eos_token_id=None)


def without_schedule(model: Any, text: list[int], plan: Any, num_new: int, **options: Any) -> list[int]:
    """Return the continuation of a prompt that is laid out beforehand, by the logits processor alone."""
    prompt = schedule_meta_tokens(text, plan, meta_token_id=META)
    processors = LogitsProcessorList([MetaTokenSchedule(plan, meta_token_id=META)])
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        logits_processor=processors,
        max_new_tokens=num_new,
        do_sample=False,
        **options,
    )
    return output[0, len(prompt) :].tolist()


def generated(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False} | options
    return model.generate(input_ids=ids, attention_mask=attention_mask_of(ids), **options)


# Schedules


def test_uniform_schedule_draws_by_the_hash_of_the_package() -> None:
    plan = UniformSchedule(0.37, seed=2**40 + 7)
    due = [plan.is_due(n - 2, 2, False) for n in range(2, 600)]
    assert due == [int(hash_key(plan.seed, n)[0]) / 2**64 < 0.37 for n in range(2, 600)]


@pytest.mark.parametrize(
    ("stated", "read"),
    [
        ({"kind": "periodic", "text_tokens": 4}, PeriodicSchedule(4)),
        ({"kind": "uniform", "ratio": 0.2, "seed": 3}, UniformSchedule(0.2, 3)),
        ("none", NoSchedule()),
        (EVERY_3, EVERY_3),
        (None, None),
    ],
)
def test_schedule_is_read_from_a_mapping_a_kind_or_itself(stated: Any, read: Any) -> None:
    assert read_schedule(stated) == read


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("often", "one of the kinds none, periodic, thought, uniform, not 'often'"),
        ({"every": 3}, "one of the kinds none, periodic, thought, uniform"),
        ({"kind": "periodic", "every": 3}, "every"),
        ({"kind": "periodic", "text_tokens": 0}, "at least 1, not 0"),
        ({"kind": "uniform", "ratio": 1.0}, "ratio must lie in"),
        (7, "not 7"),
    ],
)
def test_what_is_no_schedule_is_refused(stated: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_schedule(stated)


# What generate does


@pytest.mark.parametrize("plan", SCHEDULES, ids=lambda plan: plan.kind)
@pytest.mark.parametrize("where", ["call", "config of the call", "config of the model"])
def test_prompt_and_continuation_get_their_meta_tokens_wherever_the_schedule_is_stated(
    model: MetaTokenForCausalLM, plan: Any, where: str
) -> None:
    expected = without_schedule(model, PROMPT[0].tolist(), plan, 12)
    assert META in expected
    options: dict[str, Any] = {}
    if where == "call":
        options["meta_schedule"] = plan
    elif where == "config of the model":
        state_schedule(model.generation_config, plan)
    else:
        config = GenerationConfig(max_new_tokens=12, do_sample=False)
        state_schedule(config, plan)
        output = model.generate(PROMPT, generation_config=config)
        assert output[0, PROMPT.shape[1] :].tolist() == expected
        return
    assert generated(model, PROMPT, **options)[0].tolist() == PROMPT[0].tolist() + expected


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_padded_rows_of_a_batch_get_what_each_gets_alone(model: MetaTokenForCausalLM, options: Any) -> None:
    ids = tokens("xxxxxxxx", "...xxxxx", "......xx")
    rows = generated(model, ids, meta_schedule=EVERY_3, **options)
    assert torch.equal(rows[:: len(rows) // 3, : ids.shape[1]], ids)
    for number, given in enumerate(ids):
        alone = generated(model, given[given != PAD][None], meta_schedule=EVERY_3, **options)
        count = len(alone)
        assert torch.equal(
            rows[number * count : (number + 1) * count, ids.shape[1] :], alone[:, (given != PAD).sum() :]
        )


def test_padding_that_is_the_end_of_a_text_is_counted_by_the_mask(model: MetaTokenForCausalLM) -> None:
    text = [EOS, *PROMPT[0].tolist()]  # begins with the token that pads too
    ids = torch.tensor([[EOS, EOS, *text]])
    mask = torch.tensor([[0, 0, *[1] * len(text)]])
    row = model.generate(
        ids, attention_mask=mask, pad_token_id=EOS, meta_schedule=EVERY_3, max_new_tokens=12, do_sample=False
    )
    assert row[0, ids.shape[1] :].tolist() == without_schedule(model, text, EVERY_3, 12)


def test_prompt_with_meta_tokens_of_its_own_stays_as_it_is(model: MetaTokenForCausalLM) -> None:
    ids = tokens("xxxx_xx_x")
    row = generated(model, ids, meta_schedule=EVERY_3)
    processors = LogitsProcessorList([MetaTokenSchedule(EVERY_3, meta_token_id=META)])
    assert torch.equal(row, generated(model, ids, logits_processor=processors))


def test_a_schedule_among_the_logits_processors_takes_the_place_of_the_models(model: MetaTokenForCausalLM) -> None:
    state_schedule(model.generation_config, PeriodicSchedule(2))
    processors = LogitsProcessorList([MetaTokenSchedule(EVERY_3, meta_token_id=META)])
    row = generated(model, tokens("xxx_xxx_x"), logits_processor=processors)[0]
    assert (row == META).nonzero()[:, 0].tolist() == [3, 7, 11, 15, 19]


def test_kind_none_in_the_call_overrides_the_models_schedule(model: MetaTokenForCausalLM) -> None:
    plain = generated(model, PROMPT, meta_schedule="none")
    state_schedule(model.generation_config, EVERY_3)
    assert torch.equal(generated(model, PROMPT, meta_schedule="none"), plain)
    assert not torch.equal(generated(model, PROMPT), plain)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("length", [{"max_length": 20}, {"max_new_tokens": 13}, {}])
def test_lengths_count_new_tokens_after_the_prompt_as_it_was_given(
    model: MetaTokenForCausalLM, length: dict[str, int]
) -> None:
    row = model.generate(PROMPT, meta_schedule=EVERY_3, do_sample=False, **length)
    assert row.shape[1] == (20 if length else PROMPT.shape[1] + 20)


def test_returned_dictionary_has_the_sequences_and_a_score_for_each_new_token(model: MetaTokenForCausalLM) -> None:
    output = generated(model, PROMPT, meta_schedule=EVERY_3, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, generated(model, PROMPT, meta_schedule=EVERY_3))
    assert len(output.scores) == 12


class EndsWith(StoppingCriteria):
    """Stops a text that ends with these tokens, as those of the evaluation harness do; notes what it sees."""

    def __init__(self, ending: list[int]) -> None:
        self.ending = torch.tensor(ending)
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        del scores, kwargs
        self.seen.append(input_ids.clone())
        return (input_ids[:, -len(self.ending) :] == self.ending).all(1)


def test_stopping_criteria_read_the_text_across_meta_tokens(model: MetaTokenForCausalLM) -> None:
    # a meta-token between any two tokens of a text that does not repeat itself
    options = {"meta_schedule": PeriodicSchedule(1), "max_new_tokens": 24, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(0)
    new = generated(model, PROMPT, **options)[0, PROMPT.shape[1] :]
    text = PROMPT[0].tolist() + new[new != META].tolist()
    pairs = list(pairwise(text))
    end = next(i for i in range(PROMPT.shape[1] + 1, len(pairs)) if pairs[i] not in pairs[:i])
    criterion = EndsWith(list(pairs[end]))
    torch.manual_seed(0)
    stopped = generated(model, PROMPT, stopping_criteria=[criterion], **options)[0]
    assert stopped[stopped != META].tolist() == text[: end + 2]
    assert all(torch.equal(seen[:, : PROMPT.shape[1]], PROMPT) for seen in criterion.seen)


def test_a_text_is_not_stopped_by_a_meta_token_right_after_its_prompt(model: MetaTokenForCausalLM) -> None:
    ids = PROMPT[:, :6]
    criterion = EndsWith(ids[0, -2:].tolist())
    row = generated(model, ids, meta_schedule=EVERY_3, stopping_criteria=[criterion])[0]
    assert row[6] == META
    assert len(row) > 8


def test_schedule_for_a_model_without_a_meta_token_is_refused() -> None:
    model = tiny_model(meta_token_id=None, meta_attention_layers="none")
    with pytest.raises(ValueError, match="needs a model with a meta-token, and meta_token_id is None"):
        generated(model, PROMPT, meta_schedule=EVERY_3)


def test_model_of_another_package_with_a_meta_token_follows_a_schedule() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
    config.meta_token_id = META
    model = GPT2LMHeadModel(config).double().eval()
    ids = tokens("..xxxx", "xxxxxx")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": PAD}
    rows = schedule.generate(
        ids,
        model=model,
        attention_mask=attention_mask_of(ids),
        meta_schedule=EVERY_3,
        suppress_tokens=[PAD],
        **options,
    )
    assert (rows[0] == META).nonzero()[:, 0].tolist() == [8, 12]
    assert (rows[1] == META).nonzero()[:, 0].tolist() == [6, 10, 14]


@pytest.mark.parametrize("where", ["call", "config"])
def test_assisted_generation_follows_the_schedule(model: MetaTokenForCausalLM, where: str) -> None:
    expected = generated(model, PROMPT, meta_schedule=EVERY_3)
    options: dict[str, Any] = {"meta_schedule": EVERY_3}
    if where == "config":
        state_schedule(model.generation_config, EVERY_3)
        options = {}
    assistant = tiny_model(seed=1, eos_token_id=None)
    assert torch.equal(generated(model, PROMPT, assistant_model=assistant, **options), expected)


# The warning


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the warnings of the schedule's logger, each once as always."""
    schedule.logger.warning_once.cache_clear()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(schedule.logger, "handlers", [handler])
    monkeypatch.setattr(schedule.logger, "propagate", False)
    return messages


def test_model_with_meta_attention_that_gets_no_meta_token_warns_once(
    model: MetaTokenForCausalLM, warned: list[str]
) -> None:
    generated(model, PROMPT)
    generated(model, PROMPT)
    assert warned == [schedule.PLAIN_TEXT_WARNING]


@pytest.mark.parametrize("changes", [{"memory": {"anchors": "meta", "window": 4}}, {"meta_attention_over": "cross"}])
def test_other_uses_of_meta_tokens_warn_too(warned: list[str], changes: dict[str, Any]) -> None:
    generated(tiny_model(eos_token_id=None, **changes), PROMPT)
    assert warned == [schedule.PLAIN_TEXT_WARNING]


@pytest.mark.parametrize("stated", ["call", "config"])
def test_warning_is_silenced_by_saying_so(model: MetaTokenForCausalLM, warned: list[str], stated: str) -> None:
    if stated == "config":
        state_schedule(model.generation_config, NoSchedule())
    generated(model, PROMPT, **({"meta_schedule": "none"} if stated == "call" else {}))
    assert warned == []


@pytest.mark.parametrize(
    "case", ["scheduled", "in the prompt", "no meta-attention", "no meta-token", "other members", "training"]
)
def test_nothing_warns_where_there_are_meta_tokens_or_none_are_missed(
    model: MetaTokenForCausalLM, warned: list[str], case: str
) -> None:
    if case == "training":
        model.train()(PROMPT, labels=PROMPT).loss.backward()
    elif case == "no meta-attention":
        generated(tiny_model(meta_attention_layers="none"), PROMPT)
    elif case == "no meta-token":
        generated(tiny_model(meta_token_id=None), PROMPT)
    elif case == "other members":
        generated(tiny_model(meta_attention_over="all"), PROMPT)
    elif case == "in the prompt":
        generated(model, tokens("xx_xx"))
    else:
        generated(model, PROMPT, meta_schedule=EVERY_3)
    assert warned == []


def test_a_prompt_of_embeddings_alone_warns_that_its_schedule_is_not_followed(
    model: MetaTokenForCausalLM, warned: list[str]
) -> None:
    embeds = model.get_input_embeddings()(PROMPT)
    model.generate(inputs_embeds=embeds, meta_schedule=EVERY_3, max_new_tokens=2, do_sample=False)
    assert warned == [schedule.EMBEDDINGS_WARNING]


# Where it is saved


def test_schedule_survives_saving_loading_and_saving_again(model: MetaTokenForCausalLM, tmp_path: Path) -> None:
    state_schedule(model.generation_config, EVERY_3)
    save_model(model, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        saved = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert saved["meta_schedule"] == {"kind": "periodic", "text_tokens": 3}
        assert (tmp_path / folder / CUSTOM_GENERATE).read_bytes() == Path(schedule.__file__).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(generated(again, PROMPT), generated(model, PROMPT))


def test_what_would_be_pushed_to_the_hub_holds_the_schedule_and_its_code(
    model: MetaTokenForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, bytes] = {}

    def create_commit(self: HfApi, *, operations: list[CommitOperationAdd], **options: Any) -> None:
        del self, options
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    # the hub itself; all that leads to it is real
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda _self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(ModelCard, "load", lambda _repo_id, **_: ModelCard("---\nlicense: mit\n---\n"))
    state_schedule(model.generation_config, EVERY_3)
    model.push_to_hub("someone/owls")
    assert json.loads(uploaded["generation_config.json"])["meta_schedule"] == {"kind": "periodic", "text_tokens": 3}
    assert uploaded[CUSTOM_GENERATE.as_posix()] == Path(schedule.__file__).read_bytes()
    assert {f"{name}.py" for name in REMOTE_CODE} < uploaded.keys()


def test_custom_generate_of_a_folder_gives_another_model_its_schedule(
    model: MetaTokenForCausalLM, tmp_path: Path
) -> None:
    save_model(model, tmp_path)
    config = GPT2Config(vocab_size=24, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
    config.meta_token_id = META
    other = GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 9, "do_sample": False, "meta_schedule": {"kind": "periodic", "text_tokens": 3}}
    rows = other.generate(PROMPT, custom_generate=str(tmp_path), trust_remote_code=True, **options)
    assert (rows[0] == META).nonzero()[:, 0].tolist() == [9, 13]
    assert torch.equal(rows, schedule.generate(PROMPT, model=other, **options))
