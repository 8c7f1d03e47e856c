import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from metatokens.data.adopt import adopt
from metatokens.data.prepare import prepare
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    """Ids of documents with their ends of text, and the id of that."""
    encoder = TextEncoder(tokenizer)
    return [np.append(ids, encoder.eos_token_id) for ids in encoder.encode_batch(texts)]


def write_nanogpt(folder, documents, dtype):
    np.concatenate(documents).astype(dtype).tofile(folder / "tokens.bin")


def write_llm_c(folder, documents, dtype):
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, sum(map(len, documents))) if dtype == "<u2" else (20240801, 7, sum(map(len, documents)))
    (folder / "tokens.bin").write_bytes(header.tobytes() + np.concatenate(documents).astype(dtype).tobytes())


def write_datatrove(folder, documents, dtype):
    write_nanogpt(folder, documents, dtype)
    (folder / "tokens.bin").rename(folder / "tokens.ds")
    np.cumsum([len(ids) for ids in documents]).astype("<u8").tofile(folder / "tokens.ds.index")


def write_megatron(folder, documents, dtype):
    # two sequences a document, as when sentences were split
    write_nanogpt(folder, documents, dtype)
    lengths = np.array([part for ids in documents for part in (2, len(ids) - 2)])
    places = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8 if dtype == "<u2" else 4, len(lengths), len(documents) + 1)
    rest = [lengths.astype("<i4"), places.astype("<i8"), np.arange(0, len(lengths) + 1, 2).astype("<i8")]
    (folder / "tokens.idx").write_bytes(head + b"".join(part.tobytes() for part in rest))


WRITERS = {"nanoGPT": write_nanogpt, "llm.c": write_llm_c, "datatrove": write_datatrove, "Megatron": write_megatron}


def ends_of(out, shard):
    return np.fromfile(out / f"{shard}.index", "<u8")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("name", WRITERS)
def test_token_files_written_by_the_definition_of_their_format_are_adopted(
    name, dtype, tmp_path, documents, tokenizer_file
):
    (tmp_path / "files").mkdir()
    WRITERS[name](tmp_path / "files", documents, dtype)
    out = tmp_path / "tokens"
    given = "uint32" if (name, dtype) == ("nanoGPT", "<u4") else None
    manifest = adopt([tmp_path / "files"], out, tokenizer=str(tokenizer_file), dtype=given)
    assert manifest.options["adopted_from"] == name
    assert manifest.dtype == {"<u2": "uint16", "<u4": "uint32"}[dtype]
    with TokenDataset.open(out) as dataset:
        assert np.array_equal(dataset.read("train", 0, dataset.num_tokens("train")), np.concatenate(documents))
    assert np.array_equal(ends_of(out, "train-00000.ds"), np.cumsum([len(ids) for ids in documents]))
    (source,) = (path for path in (tmp_path / "files").iterdir() if path.suffix in {".bin", ".ds"})
    assert (out / "train-00000.ds").samefile(source) == (name != "llm.c")  # a link, but for the header
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_adopted_tokens_of_prepare_are_the_same_dataset(tmp_path, corpus, tokenizer_file):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"vocab_size": 0, "validation_fraction": 0, "shard_tokens": 1000, "options": SourceOptions()}
    prepared = prepare(str(corpus), one, tokenizer=str(tokenizer_file), **options)
    adopted = adopt([one], two, tokenizer=str(one / "tokenizer.json"))
    assert adopted.content_id == prepared.content_id
    assert adopted.shards == prepared.shards


def test_folder_of_nanogpt_goes_to_its_splits_and_a_test_set_is_left_out(tmp_path, documents, tokenizer_file):
    for name, part in (("train", documents[:60]), ("val", documents[60:100]), ("test", documents[100:])):
        np.concatenate(part).astype("<u2").tofile(tmp_path / f"{name}.bin")
    with pytest.warns(UserWarning, match="test.bin"):
        manifest = adopt([tmp_path], tmp_path / "tokens", tokenizer=str(tokenizer_file))
    assert [(shard.split, shard.num_documents) for shard in manifest.shards] == [("train", 60), ("validation", 40)]


def test_tokens_on_another_disk_are_copied(tmp_path, documents, tokenizer_file, monkeypatch):
    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    write_nanogpt(tmp_path, documents, "<u2")
    monkeypatch.setattr(os, "link", no_link)
    said = []
    adopt([tmp_path / "tokens.bin"], tmp_path / "tokens", tokenizer=str(tokenizer_file), say=said.append)
    (tmp_path / "tokens.bin").unlink()
    TokenDataset.open(tmp_path / "tokens").close()
    assert "copied" in said[0]


def no_end_of_text(folder, documents):
    write_datatrove(folder, [ids[:-1] for ids in documents], "<u2")


def other_words(folder, documents):
    write_nanogpt(folder, [np.concatenate([ids[:-1][::-1], ids[-1:]]) for ids in documents], "<u2")


@pytest.mark.parametrize(
    ("write", "warning"), [(no_end_of_text, "do not end with the end of text"), (other_words, "did it make the tokens")]
)
def test_tokens_that_are_valid_but_look_wrong_are_adopted_with_a_warning(
    tmp_path, documents, tokenizer_file, write, warning
):
    write(tmp_path, documents)
    with pytest.warns(UserWarning, match=warning):
        adopt([tmp_path], tmp_path / "out", tokenizer=str(tokenizer_file))


def beyond(folder, documents):
    write_datatrove(folder, [documents[0] + 399], "<u2")


def wide_as_narrow(folder, documents):
    write_nanogpt(folder, documents, "<u4")


def odd_size(folder, documents):
    write_nanogpt(folder, documents, "<u2")
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])


def cut(name):
    def write(folder, documents):
        WRITERS[name](folder, documents, "<u2")
        (path,) = (path for path in folder.iterdir() if path.suffix in {".bin", ".ds"})
        path.write_bytes(path.read_bytes()[:-2])

    return write


def no_index(folder, documents):
    write_datatrove(folder, documents, "<u2")
    (folder / "tokens.ds.index").unlink()


def unknown_type(folder, documents):
    write_megatron(folder, documents, "<u2")
    content = bytearray((folder / "tokens.idx").read_bytes())
    content[17] = 7
    (folder / "tokens.idx").write_bytes(content)


def short_index(folder, documents):
    write_megatron(folder, documents, "<u2")
    (folder / "tokens.idx").write_bytes((folder / "tokens.idx").read_bytes()[:-8])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (beyond, ("below 400", "at token")),
        (wide_as_narrow, ("uint16", "0 in every second place", "--dtype")),
        (odd_size, ("ids of 2 bytes", "--dtype")),
        (cut("datatrove"), ("tokens.ds", "bytes for")),
        (cut("Megatron"), ("tokens.bin", "bytes")),
        (cut("llm.c"), ("tokens.bin", "bytes for")),
        (no_index, ("tokens.ds.index", "No such file")),
        (unknown_type, ("tokens.idx", "type 7")),
        (short_index, ("tokens.idx", "sequences")),
    ],
)
def test_token_file_that_does_not_fit_is_a_data_error_and_leaves_nothing_behind(
    tmp_path, documents, tokenizer_file, fails, write, words
):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", documents)
    with fails(3, *words):
        adopt([tmp_path / "files"], tmp_path / "tokens", tokenizer=str(tokenizer_file))
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_wrong_arguments_are_usage_errors_of_one_line(tmp_path, documents, tokenizer_file, fails):
    write_nanogpt(tmp_path, documents, "<u2")
    with fails(2, "the files name none", "--tokenizer"):
        adopt([tmp_path], tmp_path / "out")
    with fails(2, "tokenizer.json", "suffix"):
        adopt([tokenizer_file], tmp_path / "out", tokenizer=str(tokenizer_file))
    with fails(2, "for training"):
        adopt([], tmp_path / "out", validation=[tmp_path], tokenizer=str(tokenizer_file))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UsageError, match="other files"):
        adopt([tmp_path], tmp_path / "out", tokenizer=str(tokenizer_file))


DATATROVE = """if True:
    import json, sys
    from pathlib import Path
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer
    folder, tokenizer = Path(sys.argv[1]), sys.argv[2]
    texts = json.loads((folder / "texts.json").read_text())
    documents = lambda: [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    eos = "<|endoftext|>"
    plain = DocumentTokenizer(str(folder / "plain"), tokenizer, eos_token=eos, shuffle_documents=False)
    plain.run(documents())
    shuffled = DocumentTokenizer(str(folder / "shuffled"), tokenizer, eos_token=eos, seed=1, max_tokens_per_file=1000)
    shuffled.run(documents())
    megatron = MegatronDocumentTokenizer(str(folder / "megatron"), tokenizer_name_or_path=tokenizer, eos_token=eos)
    megatron.run(documents())
"""


@pytest.mark.skipif(
    find_spec("datatrove") is None and "DATATROVE_PYTHON" not in os.environ,
    reason="needs datatrove, here or in the Python that DATATROVE_PYTHON names",
)
def test_what_datatrove_itself_writes_is_adopted_token_for_token(tmp_path, texts, documents, tokenizer_file):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    python = os.environ.get("DATATROVE_PYTHON", sys.executable)
    subprocess.run([python, "-c", DATATROVE, str(tmp_path), str(tokenizer_file)], check=True, capture_output=True)
    adopt([tmp_path / "plain"], tmp_path / "one")  # its metadata name the tokenizer
    adopt([tmp_path / "megatron"], tmp_path / "two", tokenizer=str(tokenizer_file))
    for out in ("one", "two"):
        with TokenDataset.open(tmp_path / out) as dataset:
            assert np.array_equal(dataset.read("train", 0, dataset.num_tokens("train")), np.concatenate(documents))
        assert np.array_equal(ends_of(tmp_path / out, "train-00000.ds"), np.cumsum([len(ids) for ids in documents]))
    shuffled = adopt([tmp_path / "shuffled"], tmp_path / "three")
    assert len(shuffled.shards) > 2
    with TokenDataset.open(tmp_path / "three") as dataset:
        ids = dataset.read("train", 0, dataset.num_tokens("train"))
        pieces = np.split(ids, np.flatnonzero(ids == dataset.eos_token_id) + 1)[:-1]
    assert sorted(map(tuple, pieces)) == sorted(map(tuple, documents))


def test_a_file_for_validation_leaves_the_folder_and_no_other_text_is_taken_twice(
    tmp_path, documents, tokenizer_file, fails
):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, part in (("corpus", documents[:60]), ("heldout", documents[60:])):
        np.concatenate(part).astype("<u2").tofile(folder / f"{name}.bin")
    heldout, given = folder / "heldout.bin", {"tokenizer": str(tokenizer_file)}
    manifest = adopt([folder], tmp_path / "one", validation=[folder / ".." / "files" / "heldout.bin"], **given)
    assert [(shard.split, shard.num_documents) for shard in manifest.shards] == [("train", 60), ("validation", 60)]
    (tmp_path / "link.bin").symlink_to(heldout)
    for sources, validation in (([folder / "corpus.bin", heldout], [tmp_path / "link.bin"]), ([folder, heldout], [])):
        with fails(2, "each token file once", heldout):
            adopt(sources, tmp_path / "two", validation=validation, **given)
    (tmp_path / "copy.bin").write_bytes(heldout.read_bytes())
    with fails(3, "copy.bin", "the tokens of", heldout):
        adopt([folder], tmp_path / "two", validation=[tmp_path / "copy.bin"], **given)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(("left", "found"), [("train-00000.ds.done", "finished shards"), ("manifest.json", "dataset")])
def test_finished_work_of_an_interrupted_preparation_is_not_removed(
    tmp_path, documents, tokenizer_file, fails, left, found
):
    write_nanogpt(tmp_path, documents, "<u2")
    partial = tmp_path / ".tokens.partial"
    partial.mkdir()
    (partial / left).touch()
    (partial / "train-00000.ds").write_bytes(b"work")
    with fails(2, partial, found):
        adopt([tmp_path / "tokens.bin"], tmp_path / "tokens", tokenizer=str(tokenizer_file))
    assert (partial / "train-00000.ds").read_bytes() == b"work"


def test_tokens_that_are_linked_are_flushed_to_the_disk(tmp_path, documents, tokenizer_file, monkeypatch):
    flushed, fsync = set(), os.fsync

    def record(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    write_nanogpt(tmp_path, documents, "<u2")
    monkeypatch.setattr(os, "fsync", record)
    adopt([tmp_path / "tokens.bin"], tmp_path / "tokens", tokenizer=str(tokenizer_file))
    assert (tmp_path / "tokens.bin").stat().st_ino in flushed
