"""One schedule everywhere: each tool that generates gives the tokens of `generate_text`.

The harness's tests need `metatokens[eval]` and the server's `metatokens[serve]`; where one is missing they are skipped.
"""

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from commands import error_line, metatokens
from metatokens.data.tokenizer import build_hf_tokenizer, text_vocab_size, train_tokenizer
from metatokens.generation.decoding import generate_text
from metatokens.generation.pipeline import TASK
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.export import save_model
from metatokens.model.schedule import NoSchedule, PeriodicSchedule, schedule_meta_tokens, state_schedule

PROMPT = "the owl sat and the"
EVERY_4 = PeriodicSchedule(4)
TEXT_TOKENS = 16
NUM_NEW = 20  # with the four meta-tokens that follow a prompt of five text tokens
DEADLINE_SECONDS = 120  # of a server to start


def is_missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


class Scheduled(NamedTuple):
    folder: Path
    model: MetaTokenForCausalLM
    tokenizer: Any
    text: str
    """What follows the prompt, by `generate_text`."""


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Scheduled:
    """Return a saved model that states a schedule."""
    tokenizer = train_tokenizer(["the owl sat, and the owl saw a mouse by the river"], 280)
    num_text = text_vocab_size(tokenizer)
    torch.manual_seed(3)
    config = MetaTokenConfig(
        vocab_size=num_text + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
        meta_token_id=num_text,
        pad_token_id=num_text + 1,
    )
    model = MetaTokenForCausalLM(config).eval()
    with torch.no_grad():  # printable bytes alone: pieces of characters are decoded differently by different tools
        model.model.norm.bias.fill_(1)
        printable = [
            i for i in range(num_text) if tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable()
        ]
        model.lm_head.weight[printable] += 1
    state_schedule(model.generation_config, EVERY_4)
    folder = tmp_path_factory.mktemp("scheduled") / "model"
    save_model(model, folder, build_hf_tokenizer(tokenizer))
    expected = generate_text(model, tokenizer, PROMPT, schedule=EVERY_4, max_text_tokens=TEXT_TOKENS, temperature=0)
    assert expected.text_tokens + expected.meta_tokens == NUM_NEW
    plain = generate_text(model, tokenizer, PROMPT, schedule=NoSchedule(), max_text_tokens=60, temperature=0)
    assert not plain.text.startswith(expected.text)
    assert len(set(expected.text)) > 3
    return Scheduled(folder, model, AutoTokenizer.from_pretrained(folder), expected.text)


# transformers' pipeline


@pytest.mark.parametrize("task", ["text-generation", TASK])
def test_pipeline_continues_a_prompt_with_the_tokens_of_the_schedule(scheduled: Scheduled, task: str) -> None:
    generator = pipeline(task, model=str(scheduled.folder), device="cpu")
    options = {"max_new_tokens": NUM_NEW, "do_sample": False}
    (alone,) = generator(PROMPT, return_full_text=False, **options)
    assert alone["generated_text"] == scheduled.text
    batch = generator([PROMPT, "a mouse"], batch_size=2, **options)
    assert batch[0][0]["generated_text"] == PROMPT + scheduled.text


def test_pipeline_task_takes_the_place_of_the_schedule_of_the_checkpoint(scheduled: Scheduled) -> None:
    generator = pipeline(TASK, model=str(scheduled.folder), device="cpu", meta_schedule="none")
    plain = generator(PROMPT, max_new_tokens=NUM_NEW, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = scheduled.model.generate(
        **scheduled.tokenizer(PROMPT, return_tensors="pt"),
        meta_schedule="none",
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    assert PROMPT + plain == scheduled.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert plain != scheduled.text


def test_pipeline_task_gives_meta_tokens_to_a_model_of_another_package(scheduled: Scheduled) -> None:
    meta = scheduled.model.config.meta_token_id
    config = GPT2Config(vocab_size=meta + 2, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=None)
    config.meta_token_id = meta
    generator = pipeline(
        TASK, model=GPT2LMHeadModel(config), tokenizer=scheduled.tokenizer, device="cpu", meta_schedule=EVERY_4
    )
    (made,) = generator(PROMPT, max_new_tokens=9, do_sample=False, return_tensors=True)
    ids = torch.tensor(made["generated_token_ids"])
    assert (ids == meta).nonzero()[:, 0].tolist() == [8, 13]  # the prompt of five has one, which is left out again


def test_pipeline_task_without_any_schedule_or_meta_token_is_refused(scheduled: Scheduled) -> None:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    for schedule, message in ((None, "needs a meta_schedule"), (EVERY_4, "needs a model with a meta-token")):
        with pytest.raises(ValueError, match=message):
            pipeline(TASK, model=GPT2LMHeadModel(config), tokenizer=scheduled.tokenizer, meta_schedule=schedule)


# The command


def test_generate_command_follows_the_schedule_of_the_checkpoint(scheduled: Scheduled) -> None:
    words = ("generate", scheduled.folder, PROMPT, "--temperature", "0", "--max-text-tokens", str(TEXT_TOKENS))
    assert metatokens(*words).stdout == PROMPT + scheduled.text + "\n"
    shown = metatokens(*words, "--every", "2", "--show-meta").stdout
    assert shown.count("_PAUSE_") == TEXT_TOKENS // 2
    assert metatokens(*words, "--schedule", "none", "--show-meta").stdout.count("_PAUSE_") == 0


def test_flag_of_another_schedule_is_refused(scheduled: Scheduled) -> None:
    line = error_line("generate", scheduled.folder, PROMPT, "--schedule", "uniform", "--every", "3", code=2)
    assert "take --schedule periodic" in line


# lm-evaluation-harness


@pytest.fixture(scope="module")
def harness(scheduled: Scheduled) -> Any:
    pytest.importorskip("lm_eval", reason="needs metatokens[eval]")
    from metatokens.evaluation.harness import MetaTokenLM

    return MetaTokenLM(str(scheduled.folder), device="cpu", batch_size=2)


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_harness_generates_the_tokens_of_the_schedule(scheduled: Scheduled, harness: Any) -> None:
    options = {"until": ["\n\n"], "max_gen_toks": NUM_NEW}
    answers = harness.generate_until([request("generate_until", prompt, options) for prompt in (PROMPT, "a mouse")])
    assert answers[0] == scheduled.text


def test_harness_stops_at_a_string_that_a_meta_token_interrupts(scheduled: Scheduled, harness: Any) -> None:
    stop = scheduled.text[2:5]
    (answer,) = harness.generate_until([request("generate_until", PROMPT, {"until": [stop], "max_gen_toks": NUM_NEW})])
    assert answer == scheduled.text.split(stop)[0]


def test_harness_scores_text_by_the_logits_before_it_among_its_meta_tokens(scheduled: Scheduled, harness: Any) -> None:
    pairs = [(PROMPT, " mouse by the river"), ("the", " owl")]
    scores = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    meta = scheduled.model.config.meta_token_id
    for (context, continuation), (found, _) in zip(pairs, scores, strict=True):
        context_ids, ids = (scheduled.tokenizer(text).input_ids for text in (context, context + continuation))
        row = schedule_meta_tokens(ids, EVERY_4, meta_token_id=meta)
        with torch.no_grad():
            log_probs = scheduled.model(torch.tensor([row])).logits[0].log_softmax(-1)
        columns = [column for column, token in enumerate(row) if token != meta][len(context_ids) :]
        assert found == pytest.approx(sum(float(log_probs[i - 1, row[i]]) for i in columns), rel=1e-4)


def test_harness_fills_the_window_with_text_and_its_meta_tokens(harness: Any) -> None:
    assert harness.max_length == 103  # four of five of 128 positions, and what is left of the last period
    (score,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", "the owl sat " * 100)])
    assert score < 0


# The server


@pytest.fixture(scope="module")
def server(scheduled: Scheduled) -> Iterator[str]:
    if is_missing("fastapi", "uvicorn", "openai"):
        pytest.skip("needs metatokens[serve]")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(scheduled.folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "metatokens.cli", *words], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.2)
        assert process.poll() is None, process.stderr
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "PeriodicSchedule(text_tokens=4" in said


def ask(url: str, scheduled: Scheduled, **options: Any) -> str:
    body = {"model": str(scheduled.folder), "prompt": PROMPT, "max_tokens": NUM_NEW, "temperature": 0} | options
    headers = {"content-type": "application/json"}
    question = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(question, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_server_answers_with_the_tokens_of_the_schedule(scheduled: Scheduled, server: str) -> None:
    answer = json.loads(ask(server, scheduled))
    assert answer["choices"][0]["text"] == scheduled.text
    assert answer["usage"]["completion_tokens"] == NUM_NEW


@pytest.mark.slow
def test_server_streams_the_tokens_of_the_schedule(scheduled: Scheduled, server: str) -> None:
    lines = [line.removeprefix("data: ") for line in ask(server, scheduled, stream=True).splitlines() if line]
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines]
    assert len(pieces) > 3
    assert "".join(pieces) == scheduled.text


def test_serve_without_its_packages_or_on_a_used_port_is_one_line(scheduled: Scheduled) -> None:
    if is_missing("fastapi", "uvicorn", "openai"):
        assert "metatokens[serve]" in error_line("serve", scheduled.folder, code=2)
        return
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        assert "choose another --port" in error_line(
            "serve", scheduled.folder, "--host", "127.0.0.1", "--port", port, code=2
        )
