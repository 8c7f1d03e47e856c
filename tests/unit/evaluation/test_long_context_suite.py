"""The long-context suite: scores equal greedy decoding, losses equal a plain forward pass, errors are one line."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from commands import error_line, metatokens
from long_texts import byte_tokenizer, decoder, write_books, write_model, write_stories
from metatokens.config.long_context import LongContextConfig
from metatokens.errors import NumericError
from metatokens.evaluation.eviction import POLICIES, Budget, Reader
from metatokens.evaluation.long_context.loss_by_distance import ranges_of
from metatokens.evaluation.long_context.subject import Row, Subject
from metatokens.evaluation.long_context.suite import answers_are_right, evaluate_long_context
from metatokens.model.schedule import PeriodicSchedule, state_schedule
from tiny_models import META, tiny_model

NUM_NEW = 5


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(decoder(), byte_tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    write_model(folder / "model")
    write_books(folder / "books")
    write_stories(folder / "babi")
    return folder


def test_an_answer_is_right_exactly_if_greedy_decoding_writes_it(subject: Subject) -> None:
    rows, wrong = [], []
    for seed, length in enumerate((30, 41, 17)):
        prompt = torch.randint(0, 257, (1, length), generator=torch.Generator().manual_seed(seed))
        forbidden = list(range(257, 260))  # no text
        written = subject.model.generate(
            prompt, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, suppress_tokens=forbidden
        )[0].tolist()
        targets = list(range(length, length + NUM_NEW))
        rows.append(Row(written, targets))
        changed = written.copy()
        changed[targets[seed]] = (changed[targets[seed]] + 1) % 257
        wrong.append(Row(changed, targets))

    def judge(batch: list[Row], chunk: int) -> list[bool]:
        reader = Reader(subject.model, POLICIES["full"], Budget(columns=64, length=50))
        return answers_are_right(subject, reader, batch, chunk)

    for chunk in (7, 64):
        assert judge(rows, chunk) == [True] * 3
        assert judge(wrong, chunk) == [False] * 3
        assert judge([rows[0], wrong[1], rows[2]], chunk) == [True, False, True]


def test_a_model_of_this_package_reads_its_meta_tokens_and_is_scored_on_text_alone() -> None:
    model = tiny_model(vocab_size=320, meta_token_id=257, pad_token_id=258, max_position_embeddings=512)
    state_schedule(model.generation_config, PeriodicSchedule(4))
    own = Subject(model, byte_tokenizer())
    row = own.row_of_text(own.encode("some text of 24 bytes ..."))
    assert [own.encode("some text of 24 bytes ...")[i] for i in (1, 4, 24)] == [
        row.ids[row.targets[i - 1]] for i in (1, 4, 24)
    ]
    assert row.ids[4::5] == [257] * 6
    assert META not in (row.ids[column] for column in row.targets) or META < 257
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0]
    best = logits[:, :257].argmax(-1).tolist()
    for target in (row.targets[3], row.targets[9]):
        for token, expected in ((best[target - 1], True), ((best[target - 1] + 1) % 257, False)):
            changed = Row([*row.ids[:target], token], [target])
            reader = Reader(model, POLICIES["full"], Budget(columns=64, length=50))
            assert answers_are_right(own, reader, [changed], 9) == [expected]


def test_the_loss_by_distance_is_that_of_one_forward_pass(subject: Subject, folder: Path) -> None:
    config = LongContextConfig(
        tasks=(), policies=("full", "window"), loss_tokens=65, books=folder / "books", columns=24, sinks=2, chunk=20
    )
    report = evaluate_long_context(subject, config)
    assert [loss.distances for loss in report.losses[:2]] == [(1, 32), (33, 64)] == list(ranges_of(65))
    nats = []
    for book in range(8):
        text = " ".join(f"In book {book} the line {line} says nothing of use." for line in range(200))
        start = text.index(" ", int(0.1 * len(text))) + 1
        ids = torch.tensor([subject.encode(text[start : start + 65])])
        with torch.no_grad():
            nats.append(cross_entropy(subject.model(ids).logits[0, :-1, :257], ids[0, 1:], reduction="none").numpy())
    expected = np.stack(nats)
    near, far, near_window, far_window = report.losses
    np.testing.assert_allclose(near.nats, expected[:, :32].mean(1), rtol=1e-4)
    np.testing.assert_allclose(far.nats, expected[:, 32:].mean(1), rtol=1e-4)
    assert far_window.difference.estimate == pytest.approx(np.mean(far_window.nats) - np.mean(far.nats), abs=1e-9)
    # a window of 24 sees what the full cache sees up to the 24th token
    assert abs(near_window.difference.estimate) < abs(far_window.difference.estimate)
    assert (far.columns, far_window.columns) == (65, 24)


def test_what_a_policy_keeps_does_not_depend_on_the_batches(subject: Subject, folder: Path) -> None:
    def kept(batch_size: int) -> list[float]:
        config = LongContextConfig(
            tasks=("babilong-qa1",),  # of unequal lengths
            lengths=(700,),
            instances=8,
            policies=("every", "pooled"),
            babi=folder / "babi",
            books=folder / "books",
            columns=77,
            window=16,
            batch_size=batch_size,
        )
        return [row.columns for row in evaluate_long_context(subject, config).rows]

    assert kept(1) == kept(8)


def test_losses_that_are_not_finite_are_an_error(folder: Path) -> None:
    model = copy.deepcopy(decoder())
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    config = LongContextConfig(tasks=(), loss_tokens=65, books=folder / "books")
    with pytest.raises(NumericError, match="logits of the books"):
        evaluate_long_context(Subject(model, byte_tokenizer()), config)


def test_the_command_writes_scores_caches_and_paired_differences(folder: Path) -> None:
    words = ["evaluate", folder / "model", "--suite", "long-context", "--instances", "8", "--lengths", "[700]"]
    words += ["--tasks", "[passkey, babilong-qa1]", "--policies", "[full, every]", "--columns", "40"]
    words += ["--books", folder / "books", "--babi", folder / "babi", "--loss_tokens", "64"]
    shown = metatokens(*words, "--out", folder / "out.json").stdout
    assert "minus full" in shown
    result = json.loads((folder / "out.json").read_text())
    assert [(row["task"], row["policy"]) for row in result["rows"]] == [
        (task, policy) for task in ("passkey", "babilong-qa1") for policy in ("full", "every")
    ]
    full, every = result["rows"][:2]
    assert full["difference"] is None
    assert every["difference"]["low"] <= every["difference"]["estimate"] <= every["difference"]["high"]
    assert len(full["right"]) == len(full["depths"]) == 8
    assert 600 < full["columns"] <= 700
    assert every["columns"] <= 40
    # two layers, keys and values, two heads of eight float32 numbers
    assert every["cache_bytes"] == pytest.approx(every["columns"] * 2 * 2 * 2 * 8 * 4)
    assert full["peak_bytes"] is None or full["peak_bytes"] > 10_000_000
    assert len(result["losses"]) == 4
    plan = json.loads(metatokens(*words, "--dry-run", "--json").stdout)
    assert plan["texts"] == 16


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--tasks", "[needel]"], 2, "did you mean 'needle'"),
        (["--policies", "[ful]"], 2, "policy: expected one of full, window"),
        (["--instances", "7"], 2, "instances: expected at least 8, which an interval needs"),
        (["--lengths", "[4096]"], 2, "lengths 4096: expected at most the 2048 positions of the model"),
        (["--lengths", "[100]"], 2, "raise lengths, or leave the task out"),
        (["--books", "no/such/books"], 2, "no such path"),
        (["--tasks", "[babilong-qa1]"], 2, "name one with --babi"),
        (["--loss_tokens", "64"], 2, "name one with --books"),
        (["--columns", "5", "--policies", "[every]"], 2, "cache of 5 columns"),
        (["--intervention", "zero_embedding"], 2, "leave it out"),
    ],
)
def test_bad_input_is_one_line(words: list[str], code: int, line: str, folder: Path) -> None:
    assert line in error_line("evaluate", folder / "model", "--suite", "long-context", *words, code=code)


def test_too_few_books_for_an_interval_are_refused(folder: Path) -> None:
    words = ["--tasks", "[]", "--loss_tokens", "64", "--books", folder / "books", "--max_books", "7"]
    line = error_line("evaluate", folder / "model", "--suite", "long-context", *words, code=2)
    assert "documents for an interval: expected at least 8, found 7" in line


def test_a_gguf_file_that_is_missing_or_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    words = ["--suite", "long-context"]
    assert "a GGUF file" in error_line("evaluate", tmp_path / "no.gguf", *words, code=4)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert "that transformers reads" in error_line("evaluate", tmp_path / "broken.gguf", *words, code=4)
