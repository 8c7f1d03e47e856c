"""A compressed document goes on as the text itself would, with its model and no other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import error_line, metatokens
from grafted_models import CONFIG, trained
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.errors import DataError, UsageError
from metatokens.generation.compressed import CompressedDocument, compress_document, content_digest
from metatokens.generation.decoding import generate_text
from metatokens.language_model import LanguageModel
from metatokens.model.accounting import cache_bytes
from metatokens.model.schedule import NoSchedule, PeriodicSchedule, UniformSchedule, schedule_meta_tokens
from tiny_models import tiny_model

DOCUMENT = "the cat sat on the mat and the dog sat on the cat and it fell asleep there in the sun " * 2
PROMPT = " and then the dog"
SCHEDULES = [NoSchedule(), PeriodicSchedule(3), UniformSchedule(0.3, seed=2)]


@pytest.fixture(scope="module", name="tokenizer")
def fixture_tokenizer() -> Any:
    return train_tokenizer([DOCUMENT] * 4, 280)


def build(tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    size = TextEncoder(tokenizer).vocab_size
    fields = {"vocab_size": size + 2, "meta_token_id": size, "pad_token_id": size + 1, "max_position_embeddings": 256}
    memory = {"anchors": "meta", "window": 6, "num_sinks": 2}
    return tiny_model(**{**fields, "memory": memory, "eos_token_id": 0, "bos_token_id": 0, **changes}, seed=seed)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {}), ("llama", {"positions": "compact"}), ("llama", {"meta_attention": True})],
    ids=["llama", "gpt2", "beyond the positions of the model", "meta-attention"],
)
def test_text_after_a_document_that_a_graft_has_read_is_that_after_the_document_itself(
    tokenizer: Any, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    size, options = TextEncoder(tokenizer).vocab_size, {"schedule": NoSchedule(), "max_text_tokens": 20}
    shape = {"vocab_size": size, **({"max_position_embeddings": 36} if "positions" in changes else {})}
    model = trained(family, replace(CONFIG, **changes), **shape)
    for temperature in (0, 1):
        options["temperature"] = temperature
        whole = generate_text(model, tokenizer, DOCUMENT + PROMPT, **options)
        compress_document(model, tokenizer, DOCUMENT, schedule=NoSchedule()).save(tmp_path / "doc.safetensors")
        document = CompressedDocument.load(tmp_path / "doc.safetensors")
        assert generate_text(model, tokenizer, PROMPT, memory=document, **options).text == whole.text
    num_text = len(TextEncoder(tokenizer).encode_batch([DOCUMENT])[0])
    num_anchors = num_text // CONFIG.every - CONFIG.num_sinks // CONFIG.every
    held = CONFIG.num_sinks + CONFIG.window + num_anchors * (2 if "meta_attention" in changes else 1)
    assert document.num_bytes * num_text == document.num_bytes_of_all(model.config) * held
    assert document.read == (num_text, 0, False)
    for other in (
        trained(family, replace(CONFIG, **{**changes, "every": 4}), **shape),
        trained(family, replace(CONFIG, **{**changes, "window": 7}), **shape),
    ):
        with pytest.raises(UsageError, match=r"compressed document.*the model that read it"):
            generate_text(other, tokenizer, PROMPT, memory=document, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": {"anchors": "meta", "window": 4, "memory_limit": 3, "positions": "compact"}},
        {"memory": {"window": 4, "anchors": "every", "layers": [1]}},
    ],
)
def test_text_after_a_document_from_a_file_is_that_after_the_document_itself(
    tokenizer: Any, schedule: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = build(tokenizer, **({"meta_attention_layers": "none"} if "memory" in changes else {}), **changes)
    options = {"schedule": schedule, "temperature": 0, "max_text_tokens": 20, "show_meta": True}
    whole = generate_text(model, tokenizer, DOCUMENT + PROMPT, **options)
    compress_document(model, tokenizer, DOCUMENT, schedule=schedule).save(tmp_path / "doc.safetensors")
    document = CompressedDocument.load(tmp_path / "doc.safetensors")
    assert document.schedule == schedule
    for _ in range(2):  # asked twice
        assert generate_text(model, tokenizer, PROMPT, memory=document, **options).text == whole.text
    expected = cache_bytes(
        model.config,
        num_positions=document.read.num_positions,
        num_meta=document.read.num_meta,
        bytes_per_number=8,
    )
    assert document.num_bytes == expected.total < document.num_bytes_of_all(model.config)


def test_a_prompt_goes_on_in_the_schedule_of_what_was_read() -> None:
    for schedule in SCHEDULES:
        whole = schedule_meta_tokens(range(40), schedule, meta_token_id=-1)
        for cut in range(1, 40):
            first = schedule_meta_tokens(range(cut), schedule, meta_token_id=-1)
            counts = {"num_text": cut, "num_meta": len(first) - cut, "after_meta": first[-1] == -1}
            assert first + schedule_meta_tokens(range(cut, 40), schedule, meta_token_id=-1, **counts) == whole


def test_another_model_a_missing_file_and_a_full_cache_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model, path = build(tokenizer), tmp_path / "doc.safetensors"
    document = compress_document(model, tokenizer, DOCUMENT, schedule=PeriodicSchedule(3))
    document.save(path)
    options = {"schedule": PeriodicSchedule(3), "memory": document}
    for other in (build(tokenizer, seed=1), build(tokenizer, memory={"anchors": "meta", "window": 7, "num_sinks": 2})):
        with pytest.raises(UsageError, match="compressed document: expected the model that read it"):
            generate_text(other, tokenizer, PROMPT, **options)
    with pytest.raises(UsageError, match="ask something"):
        generate_text(model, tokenizer, "", **options)
    with pytest.raises(UsageError, match="at most 256 positions"):
        generate_text(model, tokenizer, PROMPT * 40, **options)
    with pytest.raises(UsageError, match=r"1 to 256 positions.*shorten the text, or train with .*compact"):
        compress_document(model, tokenizer, DOCUMENT * 10, schedule=PeriodicSchedule(3))
    with pytest.raises(UsageError, match="expected one in memory mode"):
        compress_document(build(tokenizer, memory=None), tokenizer, DOCUMENT, schedule=PeriodicSchedule(3))

    with pytest.raises(DataError, match="metatokens compress"):
        CompressedDocument.load(tmp_path / "none.safetensors")


def resealed(content: dict[str, str], tensors: dict[str, Any]) -> dict[str, str]:
    return {**content, "digest": content_digest(content, tensors)}


def test_whatever_is_changed_in_a_file_is_refused_and_so_are_parts_that_say_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, path = build(tokenizer), tmp_path / "doc.safetensors"
    compress_document(model, tokenizer, DOCUMENT, schedule=PeriodicSchedule(3)).save(path)
    written = path.read_bytes()
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        content = file.metadata()
    path.write_bytes(written[:-3] + bytes([written[-3] ^ 1]) + written[-2:])
    with pytest.raises(DataError, match="another content than was written"):
        CompressedDocument.load(path)
    read = json.loads(content["read"])
    changes = {
        "model": "0" * 64,
        "read": json.dumps([read[0] + 1, *read[1:]]),
        "schedule": json.dumps({"kind": "periodic", "every": 4}),
        "digest": "0" * 64,
    }
    assert content.keys() == {"format", *changes}, "a new part of the header needs a change here"
    for name, value in changes.items():
        for changed in ({**content, name: value}, {key: content[key] for key in content if key != name}):
            save_file(tensors, path, changed)
            with pytest.raises(DataError, match=r"doc.safetensors: expected a metatokens compressed document.*written"):
                CompressedDocument.load(path)
    # as from a program that seals what it cannot have read
    bad = [("schedule", "null"), ("schedule", '{"kind": "some"}'), ("schedule", "{"), ("read", "[1, 2]"), ("read", "5")]
    bad += [("read", "[-1, 2, false]"), ("read", '["1", 2, false]'), ("read", "[0, 0, false]")]
    for name, value in bad:
        save_file(tensors, path, resealed({**content, name: value}, tensors))
        with pytest.raises(DataError, match="expected a metatokens compressed document"):
            CompressedDocument.load(path)
    for missing in ("layers.1.keys", "state.clock", "state.lost_text", "layers.0.meta_columns"):
        fewer = {name: tensor for name, tensor in tensors.items() if name != missing}
        save_file(fewer, path, resealed(content, fewer))
        with pytest.raises(DataError, match=f"found none of {missing}"):
            generate_text(model, tokenizer, PROMPT, schedule=PeriodicSchedule(3), memory=CompressedDocument.load(path))
    save_file(tensors, path)
    with pytest.raises(DataError, match="expected a metatokens compressed document"):
        CompressedDocument.load(path)


def test_both_commands_and_python_give_the_same_text(tokenizer: Any, tmp_path: Path) -> None:
    model = LanguageModel(build(tokenizer).float(), tokenizer)
    model.save(tmp_path / "model")
    (tmp_path / "doc.txt").write_text(DOCUMENT)
    out = tmp_path / "doc.safetensors"
    metatokens("compress", tmp_path / "model", tmp_path / "doc.txt", "--every", 4, "--out", out)
    asked = ("generate", tmp_path / "model", PROMPT, "--memory", out, "--temperature", 0, "--max-text-tokens", 9)
    shown = metatokens(*asked).stdout
    document = model.compress(DOCUMENT, every=4)
    text = model.generate(PROMPT, memory=document, temperature=0, max_text_tokens=9).text
    assert shown.strip() == (PROMPT + text).strip()
    torch.testing.assert_close(dict(CompressedDocument.load(out).tensors), dict(document.tensors))
    LanguageModel(build(tokenizer, seed=1).float(), tokenizer).save(tmp_path / "other")
    assert "the model that read it" in error_line("generate", tmp_path / "other", *asked[2:], code=2)
