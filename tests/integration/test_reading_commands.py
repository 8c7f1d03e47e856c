"""The verbs that read text: what they say of bad text, of a folder's other contents, and while they work."""

import contextlib
import gzip
import io
import json
import re
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken

from commands import metatokens
from metatokens.cli import reading
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.data.tokenizer import TextEncoder, build_hf_tokenizer, text_vocab_size, train_tokenizer
from metatokens.errors import DataError
from tiny_models import tiny_model

TEXT = "the quick brown fox jumps over a lazy dog\n" * 20
BAD = {
    "a missing field": ("a.jsonl", b'{"body": "x"}\n'),
    "a field that is no text": ("a.jsonl", b'{"text": null}\n'),
    "a byte order mark": ("a.txt", b"\xef\xbb\xbfsome text"),
    "another encoding": ("a.txt", "café".encode("latin-1")),
    "no JSON": ("a.jsonl", b"{oops\n"),
    "a broken archive": ("a.txt.gz", b"no gzip"),
    "a document without end": ("a.txt.gz", gzip.compress(b" " * (65 << 20))),
    "a line without end": ("a.txt", b" " * (65 << 20)),
    "another kind of file": ("a.pdf", b"%PDF"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model whose tokenizer has runs of spaces as added tokens that are not special, as GPT-NeoX's has."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 290)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False, special=False) for n in (8, 4)])
    num_text = text_vocab_size(tokenizer)
    build_hf_tokenizer(tokenizer).save_pretrained(folder)
    ids = {"meta_token_id": num_text, "pad_token_id": num_text + 1, "eos_token_id": 0, "bos_token_id": 0}
    tiny_model(vocab_size=num_text + 2, **ids).save_pretrained(folder)
    return folder


def command(verb: str, model: Path, source: Path, out: Path) -> tuple[object, ...]:
    return {
        "prepare": ("prepare", source, "--out", out, "--vocab-size", "300"),
        "perplexity": ("perplexity", model, source),
        "analyze": ("analyze", model, "--text", source, "--out", out),
        "pretrain": ("pretrain", "tiny/meta", "--data.path", source, "--out", out),
    }[verb]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("verb", ["prepare", "perplexity", "analyze", "pretrain"])
def test_a_remedy_names_only_options_that_the_verb_has(verb, kind, model, tmp_path):
    name, content = BAD[kind]
    (tmp_path / name).write_bytes(content)
    _, message = metatokens(*command(verb, model, tmp_path / name, tmp_path / "out"), code=DataError.exit_code)
    assert len(message.splitlines()) == 1
    remedy = message.rpartition(";")[2]
    help_text, _ = metatokens(verb, "-h")
    for option in {field.name for field in fields(SourceOptions)} & set(re.findall(r"\w+", remedy)):
        assert f"--{option.replace('_', '-')} " in help_text


@pytest.mark.parametrize("verb", ["prepare", "perplexity"])
def test_every_option_of_reading_is_a_flag_of_the_verbs_that_take_them(verb):
    help_text, _ = metatokens(verb, "-h")
    for field in fields(SourceOptions):
        assert f"--{field.name.replace('_', '-')} " in help_text


def test_perplexity_reads_a_file_with_a_byte_order_mark_by_the_option_that_its_error_names(model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    _, message = metatokens("perplexity", model, tmp_path / "a.txt", code=3)
    assert "set on_bad_text to replace" in message
    found, _ = metatokens("perplexity", model, tmp_path / "a.txt", "--on-bad-text", "replace", "--json")
    (tmp_path / "b.txt").write_text(TEXT)
    expected, _ = metatokens("perplexity", model, tmp_path / "b.txt", "--json")
    assert json.loads(found)["non_overlapping"] == json.loads(expected)["non_overlapping"]


def test_perplexity_of_a_long_run_of_spaces_is_measured(model, tmp_path):
    (tmp_path / "a.txt").write_text("Header" + " " * 100_000 + "x")
    found, _ = metatokens("perplexity", model, tmp_path / "a.txt", "--max-tokens", "64", "--json")
    assert json.loads(found)["text_tokens"] == 64


@pytest.mark.filterwarnings("default:left out of")  # as outside of pytest, where a warning is no error
@pytest.mark.parametrize("verb", ["prepare", "perplexity"])
def test_what_is_left_out_of_a_folder_is_said_once(verb, model, tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(40):
        (tmp_path / "books" / f"{number}.txt").write_text(f"{TEXT} {number}")
    (tmp_path / "books" / "notes.md").touch()
    _, said = metatokens(*command(verb, model, tmp_path / "books", tmp_path / "out"), "--dry-run")
    assert said.count("file of another kind ('notes.md')") == 1
    _, said = metatokens(*command(verb, model, tmp_path / "books", tmp_path / "out"))
    assert said.count("file of another kind ('notes.md')") == 1


def test_one_text_file_is_prepared_with_the_defaults_and_the_split_is_said(tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    planned, _ = metatokens(
        *command("prepare", tmp_path, tmp_path / "one.txt", tmp_path / "out"), "--dry-run", "--json"
    )
    assert json.loads(planned)["split"].startswith("one text file")
    result, said = metatokens(*command("prepare", tmp_path, tmp_path / "one.txt", tmp_path / "out"), "--json")
    assert "one.txt is one text file: the last 0.02 of it is the validation split" in said
    assert json.loads(result)["validation_documents"] == 1


def test_prepared_ids_of_a_tokenizer_with_added_tokens_are_those_of_the_tokenizer_beside_the_model(model, tmp_path):
    from transformers import AutoTokenizer

    text = "the fox:\n        jumps = 1\n    over\n"
    (tmp_path / "a.txt").write_text(text)
    metatokens(
        "prepare", tmp_path / "a.txt", "--tokenizer", model, "--validation-fraction", "0", "--out", tmp_path / "out"
    )
    with TokenDataset.open(tmp_path / "out") as dataset:
        ids = dataset.read("train", 0, dataset.num_tokens("train") - 1).tolist()
        assert TextEncoder(dataset.tokenizer()).encode_batch([text])[0].tolist() == ids
    assert ids == AutoTokenizer.from_pretrained(model).encode(text)


def test_work_is_shown_on_standard_error_in_a_pipe_and_never_on_standard_output(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_PIPE_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text(TEXT)
    result, said = metatokens(*command("prepare", model, tmp_path / "a.txt", tmp_path / "out"), "--json")
    assert json.loads(result)["train_documents"] == 1
    lines = said.splitlines()
    assert lines[1].startswith("training a tokenizer of at most 300 tokens")
    assert lines[2].startswith("tokenising")
    assert re.fullmatch(r"\d+\.\d MB, \d+ tokens \(100%\)", lines[3])
    result, said = metatokens("perplexity", model, tmp_path / "a.txt", "--window", "30", "--json")
    total = json.loads(result)["text_tokens"]
    lines = said.splitlines()
    assert lines[0] == "encoding document 1, a.txt"
    assert re.fullmatch(r"read [\d,]+ of ([\d,]+) text tokens \(100%\)", lines[-1])
    assert total > 100


def test_work_on_a_terminal_is_shown_in_place_and_its_line_ended(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(reading, "_TERMINAL_SECONDS", 0.0)
    with contextlib.redirect_stderr(Terminal()) as terminal:
        progress = reading.Progress()
        progress.show("1 of 2")
        progress.show("2 of 2")
        progress.say("next")
        progress.close()
    assert terminal.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\nnext\n"


def test_work_that_is_done_at_once_says_nothing():
    with contextlib.redirect_stderr(io.StringIO()) as err:
        progress = reading.Progress()
        progress.show("1 of 1")
        progress.close()
    assert err.getvalue() == ""


def test_a_parquet_file_of_bytes_and_lists_is_scored(model, tmp_path):
    pq.write_table(pa.table({"text": [TEXT.encode()], "tags": [["a", "b"]]}), tmp_path / "a.parquet")
    found, _ = metatokens("perplexity", model, tmp_path / "a.parquet", "--max-tokens", "20", "--json")
    assert json.loads(found)["text_tokens"] == 20


def test_a_share_that_is_done_brings_the_time_left(monkeypatch):
    monkeypatch.setattr(reading, "_PIPE_SECONDS", 0.0)
    now = iter([0.0, 10.0, 20.0, 100.0])  # one reading for the start, one for each line
    monkeypatch.setattr(reading.time, "monotonic", lambda: next(now))
    with contextlib.redirect_stderr(io.StringIO()) as err:
        progress = reading.Progress()
        progress.show("of 4", 0.0)
        progress.show("of 4", 0.25)
        progress.show("of 4", 1.0)
    assert err.getvalue().splitlines() == ["of 4 (0%)", "of 4 (25%), 30 s left", "of 4 (100%)"]
