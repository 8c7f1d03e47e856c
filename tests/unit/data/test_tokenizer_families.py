"""Tokenizers built like those of well-known models: each keeps all text and has transformers' ids, or is refused."""

import json
import logging

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from metatokens.data.byte_level import byte_alphabet
from metatokens.data.special_tokens import END_OF_TEXT
from metatokens.data.tokenizer import TextEncoder, build_hf_tokenizer, load_text_tokenizer, train_tokenizer

CODE = "if x:\n        y = 1\n    z = 'naïve café'  # 漢字 👍 12345\n"
ALPHABET = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(*splits, without=(), end=END_OF_TEXT, ordinary=(), normalizer=None) -> Tokenizer:
    alphabet = [char for char in ALPHABET if byte_alphabet()[char] not in without]
    words = {token: i for i, token in enumerate([*alphabet, "Ġ1", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("Ġ", "1"), ("a", "b")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any(s is split_like_llama for s in splits))
    steps = [split() if callable(split) else split for split in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([end])
    tokenizer.add_tokens([AddedToken(content, normalized=False, special=False) for content in ordinary])
    return tokenizer


def split_like_llama():
    return pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")


def neox() -> Tokenizer:
    return byte_level(ordinary=[" " * n for n in (8, 4, 2)], normalizer=normalizers.NFC())


def smollm2() -> Tokenizer:
    return byte_level(pre_tokenizers.Digits(individual_digits=True), without=(0xC0, 0xC1, *range(0xF5, 0x100)))


def llama3() -> Tokenizer:
    return byte_level(split_like_llama, end="<|end_of_text|>")


def qwen() -> Tokenizer:
    return byte_level(split_like_llama, ordinary=["<tool_call>", "<think>"], normalizer=normalizers.NFC())


def llama2(*, without=()) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte not in without), "▁", "i", "f"]
    names.append("▁i")
    model = models.BPE(
        vocab={token: i for i, token in enumerate(names)}, merges=[("▁", "i")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


FAMILIES = [neox, smollm2, llama3, qwen, llama2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_ids_are_those_of_transformers_and_decode_to_the_text(family, tmp_path):
    tokenizer = family()
    (ids,) = TextEncoder(tokenizer).encode_batch([CODE])
    assert ids.tolist() == PreTrainedTokenizerFast(tokenizer_object=tokenizer).encode(CODE, add_special_tokens=False)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == CODE
    build_hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(CODE, add_special_tokens=False) == ids.tolist()
    assert TextEncoder(load_text_tokenizer(str(tmp_path))).encode_batch([CODE])[0].tolist() == ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_special_tokens_stay_text(family):
    encoder = TextEncoder(family())
    for text in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<s>"):
        (ids,) = encoder.encode_batch([f"i {text} f"])
        assert encoder.eos_token_id not in ids
        assert family().decode(ids.tolist(), skip_special_tokens=False) == f"i {text} f"


def test_an_added_token_that_is_not_special_is_a_part_of_the_text():
    tokenizer = neox()
    (ids,) = TextEncoder(tokenizer).encode_batch(["if x:\n        y = 1"])
    assert tokenizer.token_to_id(" " * 8) in ids
    assert ids.tolist() == tokenizer.encode("if x:\n        y = 1").ids


def test_an_end_of_text_that_is_not_marked_as_special_stays_text_too():
    tokenizer = byte_level(end="</s>", ordinary=[END_OF_TEXT])
    encoder = TextEncoder(tokenizer)
    assert encoder.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)
    assert encoder.eos_token_id not in encoder.encode_batch([f"a{END_OF_TEXT}b"])[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda without: byte_level(without=without),
        lambda without: byte_level(pre_tokenizers.Digits(individual_digits=True), without=without),
        lambda without: byte_level(split_like_llama, without=without, normalizer=normalizers.NFC()),
        lambda without: llama2(without=without),
    ],
    ids=["gpt2", "smollm2", "qwen", "llama2"],
)
def test_every_kind_of_vocabulary_needs_the_bytes_that_occur_and_no_others(make, fails):
    TextEncoder(make([0xC0, 0xC1, *range(0xF5, 0x100)]))
    few = TextEncoder(make([0xA9, 0x04]))
    assert len(few.encode_batch(["a copyright of 1900"])[0]) > 3
    with fails(3, "'\u00a9', whose byte 0xa9 it would drop"):
        few.encode_batch(["a text", "\u00a9 1900"])
    with fails(2, "115 missing, the first 0x80"):  # an ASCII-only alphabet: 64 continuations and 51 leads
        TextEncoder(make(range(0x80, 0x100)))


def test_a_vocabulary_without_bytes_needs_an_unknown_token(fails):
    vocabulary = {END_OF_TEXT: 0, "a": 1, "<unk>": 2}
    TextEncoder(Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")))
    with fails(2, "unknown token", "text would be lost"):
        TextEncoder(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def test_a_folder_that_transformers_reads_otherwise_is_refused(tmp_path, fails):
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    load_text_tokenizer(str(tmp_path))
    # transformers builds this class's own split, whatever tokenizer.json says
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with fails(2, tmp_path, "in transformers' AutoTokenizer", "tokenizer_class"):
        load_text_tokenizer(str(tmp_path))
    load_text_tokenizer(str(tmp_path / "tokenizer.json"))


def test_removing_padding_never_moves_another_token(tmp_path, fails):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|pad|>", "<|user|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with fails(2, "<|user|>", "would become"):
        load_text_tokenizer(str(tmp_path))


@pytest.mark.parametrize("character", [" ", "a", "-", "_", "1"])
def test_training_on_a_million_equal_characters_ends_and_merges_them(character):
    tokenizer = train_tokenizer(["Header" + character * 1_000_000 + "x"], 262)
    assert len(tokenizer.encode(character * 64).ids) <= 16


@pytest.mark.parametrize("character", [" ", "\n", "\u3000", "a", "-", "1", "é"])
def test_a_long_run_of_one_character_has_the_reference_ids(tokenizer, character):
    text = "Header" + character * 200_000 + "x"
    encoder = TextEncoder(tokenizer)
    assert encoder.backend == "tiktoken"
    assert encoder.encode_batch([text])[0].tolist() == tokenizer.encode(text).ids


def test_comparing_a_short_models_tokenizer_warns_of_no_long_text(tmp_path, caplog, monkeypatch):
    tokenizer = build_hf_tokenizer(train_tokenizer(["a river and a stone"] * 2, 280))
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load_text_tokenizer(str(tmp_path))
    assert "longer than" not in caplog.text
