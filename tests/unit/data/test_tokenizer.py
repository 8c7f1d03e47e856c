import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from metatokens.data.special_tokens import END_OF_TEXT, META_TOKEN, PAD_TOKEN
from metatokens.data.tokenizer import (
    TextEncoder,
    build_hf_tokenizer,
    ends_clause_table,
    load_text_tokenizer,
    train_tokenizer,
)

SPECIALS = [END_OF_TEXT, META_TOKEN, PAD_TOKEN, "</s>", "_PAUSE_" * 3, "<|endoftext", "|>"]
TEXTS_WITH_SPECIALS = st.lists(st.one_of(st.text(), st.sampled_from(SPECIALS)), max_size=8).map("".join)


def without_tiktoken(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same vocabulary behind another splitter, which tiktoken cannot follow."""
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return other


@pytest.fixture(scope="module", params=["tiktoken", "tokenizers"])
def encoder(request, tokenizer):
    encoder = TextEncoder(tokenizer if request.param == "tiktoken" else without_tiktoken(tokenizer))
    assert encoder.backend == request.param
    return encoder


def test_training_twice_gives_the_same_tokenizer(texts, tokenizer):
    assert train_tokenizer(texts, 400).to_str() == tokenizer.to_str()


def test_training_uses_only_the_end_of_text_as_special_token(tokenizer):
    added = json.loads(tokenizer.to_str())["added_tokens"]
    assert [token["content"] for token in added] == [END_OF_TEXT]
    assert tokenizer.get_vocab_size() == 400


def test_training_a_vocabulary_without_room_for_bytes_is_a_usage_error(fails):
    with fails(2, "vocab_size", 257, 100):
        train_tokenizer(["text"], 100)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS_WITH_SPECIALS)
def test_text_never_encodes_to_a_special_token_and_decodes_to_itself(text, encoder, tokenizer):
    (ids,) = encoder.encode_batch([text])
    assert ids.dtype == np.uint32
    assert not (ids >= encoder.vocab_size).any()
    assert encoder.eos_token_id not in ids
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


@settings(max_examples=150, deadline=None)
@given(text=TEXTS_WITH_SPECIALS)
def test_both_backends_give_the_same_ids(text, tokenizer):
    fast, reference = TextEncoder(tokenizer), TextEncoder(without_tiktoken(tokenizer))
    assert fast.encode_batch([text])[0].tolist() == reference.encode_batch([text])[0].tolist()


def test_encoding_many_texts_keeps_their_order(encoder, texts):
    together = encoder.encode_batch(texts)
    assert [ids.tolist() for ids in together] == [encoder.encode_batch([text])[0].tolist() for text in texts]


def test_encoding_a_lone_surrogate_is_a_data_error_with_its_place(encoder, fails):
    with fails(3, "surrogate", "character 2"):
        encoder.encode_batch(["ok", "ab\ud800"])


def test_encoder_attributes_describe_the_text_vocabulary(tokenizer):
    encoder = TextEncoder(tokenizer)
    assert encoder.vocab_size == 400
    assert encoder.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)
    assert encoder.sha256 == hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def test_encoder_falls_back_when_ids_do_not_follow_the_merges(tokenizer):
    specification = json.loads(tokenizer.to_str())
    vocabulary = specification["model"]["vocab"]
    ids = {token: 700 - i if i > 300 else i for token, i in vocabulary.items()}
    specification["model"]["vocab"] = ids
    shuffled = Tokenizer.from_str(json.dumps(specification))
    assert TextEncoder(shuffled).backend == "tokenizers"


def test_encoder_refuses_a_byte_level_vocabulary_without_all_bytes(fails):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, END_OF_TEXT: 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with fails(2, "243 bytes", "0x00"):
        TextEncoder(tokenizer)


def test_encoder_refuses_a_vocabulary_that_spells_its_end_of_text_in_plain_text(fails):
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, END_OF_TEXT: 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT])
    with fails(2, END_OF_TEXT):
        TextEncoder(tokenizer)


def test_loading_accepts_a_file_a_folder_and_gpt2s_two_files(tmp_path, tokenizer, tokenizer_file):
    model = json.loads(tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    loaded = [load_text_tokenizer(str(path)) for path in (tokenizer_file, tokenizer_file.parent, tmp_path)]
    assert [TextEncoder(one).sha256 for one in loaded] == [TextEncoder(tokenizer).sha256] * 3


def test_loading_a_models_folder_gives_back_its_text_tokenizer(tmp_path, tokenizer):
    build_hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    loaded = load_text_tokenizer(str(tmp_path))
    assert loaded.token_to_id(META_TOKEN) is None
    assert loaded.to_str() == tokenizer.to_str()


def test_loading_nothing_is_a_usage_error_on_one_line(tmp_path, fails):
    with fails(2, "no-one/no-such-tokenizer"):
        load_text_tokenizer("no-one/no-such-tokenizer")
    with fails(2, tmp_path, "merges.txt"):
        load_text_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{]")
    with fails(2, "tokenizer.json"):
        load_text_tokenizer(str(tmp_path))


def test_loading_a_vocabulary_without_an_end_of_text_is_a_usage_error(tmp_path, fails):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with fails(2, END_OF_TEXT):
        load_text_tokenizer(str(tmp_path))


def test_loading_a_vocabulary_with_the_meta_token_as_text_is_a_usage_error(tmp_path, fails):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, META_TOKEN: 1, END_OF_TEXT: 2}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with fails(2, META_TOKEN, "id 1"):
        load_text_tokenizer(str(tmp_path))


def test_model_tokenizer_puts_the_meta_token_and_padding_behind_the_text(tmp_path, tokenizer):
    build_hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    for model_tokenizer in (build_hf_tokenizer(tokenizer), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(model_tokenizer) == 402
        assert (model_tokenizer.meta_token, model_tokenizer.meta_token_id) == (META_TOKEN, 400)
        assert (model_tokenizer.pad_token, model_tokenizer.pad_token_id) == (PAD_TOKEN, 401)
        assert model_tokenizer.bos_token_id == model_tokenizer.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)


def test_model_tokenizer_leaves_no_stray_space_before_the_meta_token(tokenizer):
    model_tokenizer = build_hf_tokenizer(tokenizer)
    hello, world = (tokenizer.encode(text).ids for text in ("hello", " world"))
    assert model_tokenizer("hello _PAUSE_ world")["input_ids"] == [*hello, 400, *world]
    assert model_tokenizer.decode([*hello, 400, *world], skip_special_tokens=True) == "hello world"


def test_clause_table_marks_punctuation_and_line_ends(tokenizer):
    table = ends_clause_table(tokenizer)
    assert table.shape == (400,)
    encoder = TextEncoder(tokenizer)
    for text, ends in ((".", True), (",", True), ("\n", True), ("?", True), ("a", False), ("-", False)):
        assert table[encoder.encode_batch([text])[0][-1]] == ends
    assert not table[encoder.eos_token_id]
