import json
import logging
import os
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatokens.data.shard_writer import ShardWriter
from metatokens.data.shards import TokenDataset
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import DataError


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    del manifest["sha256"]  # the seal
    path.write_text(json.dumps(manifest))


def writer(folder, **changes):
    settings = {"dtype": "uint16", "shard_tokens": 10, "vocab_size": 100, "eos_token_id": 0}
    return ShardWriter(folder, "train", **(settings | changes))


def test_reading_gives_back_every_document_across_shards(dataset, texts):
    encoder = TextEncoder(dataset.tokenizer())
    stream = {split: dataset.read(split, 0, dataset.num_tokens(split)) for split in ("train", "validation")}
    found = []
    for ids in stream.values():
        ends = np.flatnonzero(ids == dataset.eos_token_id)
        assert ends[-1] == len(ids) - 1
        found += [piece.tolist() for piece in np.split(ids, ends + 1)[:-1]]
    expected = [[*ids.tolist(), dataset.eos_token_id] for ids in encoder.encode_batch(texts)]
    assert sorted(found) == sorted(expected)
    assert len([shard for shard in dataset.manifest.shards if shard.split == "train"]) > 3


def test_reading_any_range_equals_the_slice_of_the_whole(dataset):
    num_tokens = dataset.num_tokens("train")
    whole = dataset.read("train", 0, num_tokens)
    assert whole.dtype == np.uint16
    rng = np.random.default_rng(0)
    for start, count in rng.integers(0, num_tokens // 2, (50, 2)).tolist():
        np.testing.assert_array_equal(dataset.read("train", start, count), whole[start : start + count])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 10**9), (5, -1)])
def test_reading_outside_of_the_split_is_a_value_error(dataset, start, count):
    with pytest.raises(ValueError, match="are not in"):
        dataset.read("train", start, count)


def test_index_holds_the_document_ends_of_each_shard(dataset):
    for shard in dataset.manifest.shards:
        ids = np.fromfile(dataset.path / shard.name, dtype="<u2")
        ends = np.fromfile(dataset.path / f"{shard.name}.index", dtype="<u8")
        np.testing.assert_array_equal(ends, np.flatnonzero(ids == dataset.eos_token_id) + 1)
        assert (ids.min(), ids.max()) == (shard.min_id, shard.max_id)


def test_writer_never_cuts_a_document_at_the_limit_of_a_shard(tmp_path):
    shards = writer(tmp_path)
    for length in (4, 30, 0, 9):
        shards.add(np.full(length, 7, dtype=np.uint32))
    entries = shards.close()
    assert [(e.name, e.num_tokens, e.num_documents, e.first_document) for e in entries] == [
        ("train-00000.ds", 36, 2, 0),
        ("train-00001.ds", 11, 2, 2),
    ]


@pytest.mark.parametrize(("dtype", "vocab_size", "token"), [("uint16", 70_000, 65_536), ("uint32", 100, 100)])
def test_writer_refuses_an_id_that_would_wrap_or_is_no_token(tmp_path, fails, dtype, vocab_size, token):
    shards = writer(tmp_path, dtype=dtype, vocab_size=vocab_size)
    with fails(3, token):
        shards.add(np.array([1, token], dtype=np.uint32))


def test_writer_refuses_an_end_of_text_inside_of_a_document(tmp_path, fails):
    with fails(3, "1 ends of text"):
        writer(tmp_path).add(np.array([1, 0, 2], dtype=np.uint32))


def break_shard(folder):
    with (folder / "train-00001.ds").open("r+b") as file:
        file.seek(11)
        byte = file.read(1)[0]
        file.seek(11)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: os.truncate(f / "train-00001.ds", 10), ["train-00001.ds", "10 bytes"]),
        (lambda f: os.truncate(f / "train-00001.ds", 100_000), ["train-00001.ds", "100000 bytes"]),
        (lambda f: (f / "train-00001.ds").unlink(), ["train-00001.ds", "No such file"]),
        (lambda f: (f / "train-00001.ds.index").unlink(), ["train-00001.ds.index", "No such file"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "No such file"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json", "SHA-256"]),
        (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "metatokens prepare"]),
        (lambda f: (f / "manifest.json").write_text('{"format'), ["manifest.json", "JSON"]),
        (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json", "format"]),
        (lambda f: edit_manifest(f, version=2), ["manifest.json", "version 1", "update metatokens"]),
        (lambda f: edit_manifest(f, byteorder="big"), ["manifest.json", "byteorder"]),
        (lambda f: edit_manifest(f, dtype="uint32"), ["manifest.json", "uint32"]),
        (lambda f: edit_manifest(f, vocab_size=401), ["manifest.json", "content_id"]),
        (lambda f: edit_manifest(f, vocab_size=200), ["manifest.json", "max_id"]),
        (lambda f: edit_manifest(f, surprise=1), ["manifest.json", "surprise"]),
    ],
)
@pytest.mark.parametrize("verify", ["full", "size"])
def test_damaged_folder_is_a_data_error_that_names_the_file(prepared, fails, change, words, verify):
    change(prepared)
    with fails(3, *words):
        TokenDataset.open(prepared, verify=verify)


@pytest.mark.parametrize("name", ["../train-00000.ds", "/etc/passwd", "a\nb.ds", "..", ".hidden", ""])
def test_manifest_with_a_name_outside_of_the_folder_is_a_data_error(prepared, fails, name):
    shards = json.loads((prepared / "manifest.json").read_text())["shards"]
    edit_manifest(prepared, shards=[shards[0] | {"name": name}, *shards[1:]])
    with fails(3, "manifest.json", "shards.0.name"):
        TokenDataset.open(prepared)


def test_shard_behind_a_symbolic_link_is_a_data_error(prepared, tmp_path, fails):
    (prepared / "train-00000.ds").rename(tmp_path / "elsewhere.ds")
    (prepared / "train-00000.ds").symlink_to(tmp_path / "elsewhere.ds")
    with fails(3, "train-00000.ds"):
        TokenDataset.open(prepared)


def test_pipe_in_place_of_a_shard_is_a_data_error_and_no_hang(prepared, fails):
    (prepared / "train-00000.ds").unlink()
    os.mkfifo(prepared / "train-00000.ds")
    with fails(3, "train-00000.ds", "regular file"):
        TokenDataset.open(prepared)


def test_flipped_bit_is_found_by_full_verification(prepared, fails):
    break_shard(prepared)
    TokenDataset.open(prepared, verify="size").close()
    with fails(3, "train-00001.ds", "SHA-256"):
        TokenDataset.open(prepared, verify="full")


def test_processes_that_divide_the_shards_find_a_flipped_bit_once(prepared, fails):
    break_shard(prepared)
    with TokenDataset.open(prepared, verify="size") as dataset:
        dataset.verify_hashes((0, 2))
        dataset.verify_hashes((0, 2))
        with fails(3, "train-00001.ds", "SHA-256"):
            dataset.verify_hashes((1, 2))


def test_shard_truncated_under_an_open_dataset_is_a_data_error(prepared, fails):
    with TokenDataset.open(prepared) as dataset:
        os.truncate(prepared / "train-00001.ds", 100)
        with fails(3, "train-00001.ds", "100 bytes"):
            dataset.read("train", 0, dataset.num_tokens("train"))


def test_a_shard_that_the_disk_cannot_read_is_a_data_error_with_its_name(prepared, fails):
    with TokenDataset.open(prepared) as dataset:
        unreadable = os.open("/proc/self/mem", os.O_RDONLY)  # no page is mapped at its start: EIO, as of a bad disk
        os.dup2(unreadable, dataset._descriptors["train-00001.ds"])
        os.close(unreadable)
        with fails(3, "train-00001.ds", "a readable file", "Input/output error"):
            dataset.read("train", 0, dataset.num_tokens("train"))


def test_extra_file_is_a_warning(prepared, caplog):
    (prepared / "train-99999.ds").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        TokenDataset.open(prepared).close()
    assert "train-99999.ds" in caplog.text


def test_missing_folder_is_a_data_error_with_the_command_that_makes_one(tmp_path, fails):
    with fails(3, "no such folder", "metatokens prepare"):
        TokenDataset.open(tmp_path / "nowhere")


def test_opening_leaves_no_descriptor_behind(prepared):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        TokenDataset.open(prepared).close()
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_manifest_with_one_byte_changed_is_refused_or_means_the_same(data, prepared):
    path = prepared / "manifest.json"
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    with TokenDataset.open(prepared) as dataset:
        whole, content_id = dataset.read("train", 0, dataset.num_tokens("train")), dataset.content_id
    path.write_bytes(original[:position] + data.draw(st.binary(min_size=1, max_size=1)) + original[position + 1 :])
    with suppress(DataError), TokenDataset.open(prepared) as dataset:
        assert dataset.content_id == content_id
        np.testing.assert_array_equal(dataset.read("train", 0, dataset.num_tokens("train")), whole)
    path.write_bytes(original)
