import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from metatokens.data import encoding_processes
from metatokens.data import prepare as prepare_module
from metatokens.data.encoding_processes import encode_batches_in_processes
from metatokens.data.prepare import check, prepare, split_of
from metatokens.data.shards import TokenDataset
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.data.special_tokens import END_OF_TEXT, META_TOKEN
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError


def run(source, out, tokenizer, **changes):
    arguments = {
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": 300,
        "validation_fraction": 0.2,
        "shard_tokens": 1000,
        "options": SourceOptions(),
    }
    return prepare(str(source), out, **(arguments | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(dataset, split):
    ids = dataset.read(split, 0, dataset.num_tokens(split)) if dataset.num_tokens(split) else np.empty(0, int)
    ends = np.flatnonzero(ids == dataset.eos_token_id)
    return [dataset.tokenizer().decode(piece[:-1].tolist()) for piece in np.split(ids, ends + 1)[:-1]]


def test_prepare_twice_gives_the_same_bytes(corpus, tmp_path):
    first = run(corpus, tmp_path / "one", None)
    assert run(corpus, tmp_path / "two", None) == first
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepare_on_one_core_gives_the_same_bytes(corpus, tokenizer_file, tmp_path):
    cores = os.sched_getaffinity(0)
    run(corpus, tmp_path / "all", tokenizer_file)
    try:
        os.sched_setaffinity(0, {min(cores)})
        run(corpus, tmp_path / "one", tokenizer_file)
    finally:
        os.sched_setaffinity(0, cores)
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(encoding_processes, "_WAITING_CHARACTERS", 1000)


@pytest.mark.usefixtures("small_batches")
def test_prepare_gives_the_same_bytes_for_any_number_of_processes_killed_or_not(corpus, tokenizer_file, tmp_path):
    run(corpus, tmp_path / "one", tokenizer_file, shard_tokens=300)
    calls = []
    run(corpus, tmp_path / "two", tokenizer_file, shard_tokens=300, jobs=2, progress=lambda *done: calls.append(done))
    assert len(calls) > 20
    assert calls == sorted(calls)
    partial_folder = kill(corpus, tmp_path / "three", tokenizer_file, 12, jobs=3)
    finished = {path: path.stat().st_mtime_ns for path in partial_folder.glob("*.ds")}
    assert len(list(partial_folder.glob("*.done"))) > 3
    run(corpus, tmp_path / "three", tokenizer_file, shard_tokens=300, jobs=3)
    kept = [tmp_path / "three" / path.name for path, time_ns in finished.items()]
    assert sum(path.stat().st_mtime_ns == finished[partial_folder / path.name] for path in kept) > 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_batches_are_drawn_no_further_than_the_processes_need(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding_processes, "_WAITING_CHARACTERS", 100)
    drawn = []

    def batches():
        for number in range(40):
            drawn.append(number)
            yield SimpleNamespace(texts=[f"text {number} " * 5], number=number)

    for batch, ids in encode_batches_in_processes(batches(), tokenizer.to_str().encode(), 2):
        assert tokenizer.decode(ids[0].tolist()) == batch.texts[0]
        assert len(drawn) - batch.number <= 2 * 100 // len(batch.texts[0]) + 2
    assert batch.number == 39


def test_encoding_process_that_cannot_start_is_a_resource_error_and_leaves_nothing_open(
    corpus, tokenizer_file, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    before = len(os.listdir("/proc/self/fd"))
    with fails(6, "encoding process", "No such file", "--jobs") as caught:
        run(corpus, tmp_path / "tokens", tokenizer_file, jobs=2)
    del caught
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_batches")
def test_encoding_process_that_is_killed_is_a_resource_error_of_one_line(corpus, tokenizer_file, tmp_path, fails):
    def kill_all(*_):
        for pid, (parent, _) in processes().items():
            # this process has other children, such as the server from which tests fork
            if parent == os.getpid() and b"encoding_processes" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    with fails(6, "encoding process", "ended by SIGKILL", "--jobs"):
        run(corpus, tmp_path / "tokens", tokenizer_file, jobs=2, progress=kill_all)
    assert list(tmp_path.iterdir()) == []


def test_encoding_process_that_fails_tells_its_error_in_one_line(fails):
    batches = [SimpleNamespace(texts=["text"])]
    with fails(6, "encoding process", "UsageError", "a tokenizer.json of Hugging Face"):
        list(encode_batches_in_processes(batches, b"{}", 1))


def test_prepare_leaves_nothing_but_the_folder_behind(corpus, tokenizer_file, tmp_path):
    run(corpus, tmp_path / "deep" / "tokens", tokenizer_file)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokens"]


def test_splits_share_no_text_even_when_the_corpus_repeats_itself(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {n % 90}"}}\n' for n in range(200)))
    run(tmp_path / "a.jsonl", tmp_path / "tokens", tokenizer_file)
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        train, validation = (documents_of(dataset, split) for split in ("train", "validation"))
    assert set(train) & set(validation) == set()
    assert Counter(train + validation) == Counter(d.text for d in iterate_documents(str(tmp_path / "a.jsonl")))
    assert all(split_of(text, 0.2) == "validation" for text in validation)


def test_split_takes_the_asked_share_of_many_documents():
    share = sum(split_of(str(n), 0.1) == "validation" for n in range(5000)) / 5000
    assert abs(share - 0.1) < 0.02


def test_special_token_strings_in_a_corpus_stay_text(tmp_path, tokenizer_file):
    text = f"{META_TOKEN} and {END_OF_TEXT}{END_OF_TEXT} <|pad|>"
    (tmp_path / "a.txt").write_text(text)
    manifest = run(tmp_path / "a.txt", tmp_path / "tokens", tokenizer_file, validation_fraction=0)
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        assert documents_of(dataset, "train") == [text]
    assert manifest.shards[0].max_id < manifest.vocab_size
    assert manifest.shards[0].num_documents == 1


def test_manifest_records_files_counts_and_options_without_places(corpus, tokenizer_file, tmp_path):
    manifest = run(corpus, tmp_path / "tokens", tokenizer_file)
    assert len(manifest.source_files) == 120
    assert manifest.source == corpus.name
    assert manifest.options["shard_tokens"] == 1000
    assert str(tmp_path.parent) not in manifest.to_json()
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        assert dataset.manifest == manifest
        assert dataset.manifest.tokenizer_sha256 == TextEncoder(dataset.tokenizer()).sha256


def test_progress_counts_up_to_the_whole_corpus(corpus, tokenizer_file, tmp_path, texts):
    calls = []
    manifest = run(corpus, tmp_path / "tokens", tokenizer_file, progress=lambda *done: calls.append(done))
    num_tokens = sum(shard.num_tokens for shard in manifest.shards)
    assert calls[-1] == (sum(len(text.encode()) for text in texts), num_tokens)


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0} | {f"w{i}": i for i in range(1, 70_000)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.save(str(path))
    return path


def test_large_vocabulary_is_stored_in_uint32_whatever_ids_occur(tmp_path, large_tokenizer):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    out = tmp_path / "tokens"
    manifest = run(tmp_path / "a.txt", out, large_tokenizer, validation_fraction=0)
    assert manifest.dtype == "uint32"
    with TokenDataset.open(out) as dataset:
        assert dataset.read("train", 0, 4).tolist() == [1, 2, 3, 0]


def test_large_vocabulary_in_explicit_uint16_is_a_usage_error(tmp_path, large_tokenizer, fails):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    with fails(2, "uint16", 65535, 70000):
        run(tmp_path / "a.txt", tmp_path / "tokens", large_tokenizer, dtype="uint16")


@pytest.mark.parametrize("content", ["", '{"text": ""}\n' * 5])
def test_corpus_without_a_token_is_a_data_error(tmp_path, tokenizer_file, fails, content):
    (tmp_path / "a.jsonl").write_text(content)
    with fails(3, "a.jsonl", "train split"):
        run(tmp_path / "a.jsonl", tmp_path / "tokens", tokenizer_file)
    assert not (tmp_path / "tokens").exists()


def test_corpus_too_small_for_two_splits_is_a_data_error(tmp_path, tokenizer_file, fails):
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}')
    with fails(3, "1 documents", "validation_fraction"):
        run(tmp_path / "a.jsonl", tmp_path / "tokens", tokenizer_file)


@pytest.mark.parametrize("changes", [{"validation_fraction": 1.0}, {"shard_tokens": 0}])
def test_argument_out_of_range_is_a_value_error(corpus, tokenizer_file, tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        run(corpus, tmp_path / "tokens", tokenizer_file, **changes)


def test_folder_that_is_taken_is_a_usage_error_and_stays_as_it_is(prepared, corpus, tokenizer_file, tmp_path, fails):
    before = contents(prepared)
    with fails(2, prepared, "a prepared dataset"):
        run(corpus, prepared, tokenizer_file)
    assert contents(prepared) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with fails(2, "other files"):
        run(corpus, tmp_path / "notes", tokenizer_file)


def test_folder_that_cannot_be_made_is_a_usage_error(corpus, tokenizer_file, tmp_path, fails):
    (tmp_path / "file").write_text("in the way")
    with fails(2, "file/tokens"):
        run(corpus, tmp_path / "file" / "tokens", tokenizer_file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere; runs as any other user")
def test_read_only_folder_is_a_usage_error(corpus, tokenizer_file, tmp_path, fails):
    (tmp_path / "locked").mkdir(mode=0o500)
    with fails(2, "locked"):
        run(corpus, tmp_path / "locked" / "tokens", tokenizer_file)


def test_bad_document_leaves_nothing_behind(tmp_path, tokenizer_file, fails):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("fine")
    (tmp_path / "corpus" / "b.txt").write_bytes(b"\xff")
    (tmp_path / "out").mkdir()
    with fails(3, "b.txt"):
        run(tmp_path / "corpus", tmp_path / "out" / "tokens", tokenizer_file)
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_is_a_resource_error_and_leaves_nothing_behind(corpus, tokenizer_file, tmp_path, fails):
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # a limit on file sizes fails writes as a full disk does, and can be lifted again
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with fails(6, "bytes free"):
            run(corpus, tmp_path / "out" / "tokens", tokenizer_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


LINES = "".join(f"line {n} of the one text\n" for n in range(400))


def test_one_text_file_is_cut_at_a_line_end_into_training_and_validation(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text(LINES)
    said = []
    manifest = run(tmp_path / "a.txt", tmp_path / "tokens", tokenizer_file, say=said.append)
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        (train,), (validation,) = (documents_of(dataset, split) for split in ("train", "validation"))
    assert train + validation == LINES
    assert train.endswith("\n")
    assert abs(len(validation) - 0.2 * len(LINES)) < 30  # a line
    assert manifest.split_rule.startswith("one text file")
    assert "the last 0.2 of it is the validation split" in said[0]


def test_one_text_file_without_a_line_end_is_cut_within_its_line(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text("ab" * 50)
    run(tmp_path / "a.txt", tmp_path / "tokens", tokenizer_file)
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        assert documents_of(dataset, "validation") == ["ab" * 10]


def test_one_text_file_for_training_alone_stays_one_document(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text(LINES)
    run(tmp_path / "a.txt", tmp_path / "tokens", tokenizer_file, validation_fraction=0)
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        assert documents_of(dataset, "train") == [LINES]


def test_text_file_longer_than_a_document_may_be_is_cut_at_line_ends_and_loses_nothing(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text(LINES)
    run(tmp_path / "a.txt", tmp_path / "tokens", tokenizer_file, options=SourceOptions(max_document_bytes=1000))
    with TokenDataset.open(tmp_path / "tokens") as dataset:
        train, validation = (documents_of(dataset, split) for split in ("train", "validation"))
    assert "".join(train + validation) == LINES
    assert len(train) > 5
    assert max(map(len, train)) <= 1000


@pytest.mark.parametrize("there", [True, False], ids=["of a folder", "of nothing yet"])
def test_prepare_into_a_link_makes_the_folder_that_it_points_to(corpus, tokenizer_file, tmp_path, there):
    if there:
        (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    run(corpus, tmp_path / "out", tokenizer_file)
    assert (tmp_path / "out").is_symlink()
    with TokenDataset.open(tmp_path / "big") as dataset:
        assert dataset.num_tokens("train") > 0


def refusals(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {tmp_path / "loop": "symbolic links", tmp_path / ("x" * 250): "too long", Path("/proc"): "mounted disk"}


@pytest.mark.parametrize("number", range(3))
def test_place_that_cannot_take_the_finished_folder_is_refused_by_a_dry_run_too(tmp_path, corpus, number, fails):
    out, found = list(refusals(tmp_path).items())[number]
    for begin in (check, partial(prepare, vocab_size=300)):
        with fails(2, found):
            begin(
                str(corpus),
                out,
                tokenizer=None,
                validation_fraction=0.2,
                shard_tokens=1000,
                options=SourceOptions(),
            )


def test_error_after_finished_shards_keeps_them_and_names_them(corpus, tokenizer_file, tmp_path, fails, encoded):
    damaged = shutil.copytree(corpus, tmp_path / "corpus")
    last = max(damaged.iterdir())
    whole = last.read_bytes()
    last.write_bytes(b"\xff")
    (tmp_path / "out").mkdir()
    out, partial_folder = tmp_path / "out" / "tokens", tmp_path / "out" / ".tokens.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_BATCH_CHARACTERS", 500)
        with fails(3, last.name, "finished shards are kept in", partial_folder):
            run(damaged, out, tokenizer_file, shard_tokens=300)
    assert list(partial_folder.glob("*.done"))
    last.write_bytes(whole)
    encoded.clear()
    run(damaged, out, tokenizer_file, shard_tokens=300)
    assert sum(encoded) < 30
    run(corpus, tmp_path / "again" / "tokens", tokenizer_file, shard_tokens=300)
    with TokenDataset.open(out) as one, TokenDataset.open(tmp_path / "again" / "tokens") as other:
        assert one.content_id == other.content_id
    assert list(out.parent.iterdir()) == [out]


def test_tokenizer_that_loses_text_is_refused_before_anything_is_read(tmp_path, corpus, fails):
    ascii_only = Tokenizer(models.BPE(vocab={END_OF_TEXT: 0, "a": 1}, merges=[]))
    ascii_only.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ascii_only.save(str(tmp_path / "t.json"))
    with fails(2, "243 bytes of UTF-8"):
        check(
            str(corpus),
            tmp_path / "tokens",
            tokenizer=str(tmp_path / "t.json"),
            validation_fraction=0.2,
            shard_tokens=1000,
            options=SourceOptions(),
        )


def test_second_process_on_one_folder_is_a_usage_error(corpus, tokenizer_file, tmp_path):
    # as the first process would hold it; flock conflicts between two opens of one process as well
    with (tmp_path / ".tokens.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            UsageError, match="tokens: another `metatokens prepare` or `metatokens adopt` is writing this folder"
        ):
            run(corpus, tmp_path / "tokens", tokenizer_file)
    run(corpus, tmp_path / "tokens", tokenizer_file)


def test_prepare_that_waits_takes_what_the_other_process_made_of_the_same(
    corpus, tokenizer_file, tmp_path, prepared_once, fails
):
    out, said = tmp_path / "tokens", []
    with ThreadPoolExecutor(1) as pool:
        with (tmp_path / ".tokens.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(run, corpus, out, tokenizer_file, wait=True, say=said.append)
            wait_until(lambda: said)
            shutil.copytree(prepared_once, out)
            assert not waiting.done()
        assert waiting.result() == TokenDataset.open(prepared_once).manifest
    assert "waiting for it to end" in said[0]
    assert "finished already" in said[1]
    with fails(2, "options"):
        run(corpus, out, None, wait=True)
    (corpus_changed := shutil.copytree(corpus, tmp_path / corpus.name) / "000.txt").write_text("changed")
    with fails(2, "source_files"):
        run(corpus_changed.parent, out, tokenizer_file, wait=True)


def test_prepare_that_waits_does_the_work_if_the_other_process_gives_up(corpus, tokenizer_file, tmp_path):
    said = []
    with ThreadPoolExecutor(1) as pool, (tmp_path / ".tokens.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(run, corpus, tmp_path / "tokens", tokenizer_file, wait=True, say=said.append)
        wait_until(lambda: said)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result().shards
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from metatokens.data import encoding_processes, prepare as module
    from metatokens.data.sources import SourceOptions
    module._BATCH_CHARACTERS = 500
    encoding_processes._WAITING_CHARACTERS = 1000
    calls = iter(range(int(sys.argv[4])))
    module.prepare(sys.argv[1], Path(sys.argv[2]), tokenizer=sys.argv[3], vocab_size=0, validation_fraction=0.2,
                   shard_tokens=300, options=SourceOptions(), jobs=int(sys.argv[5]),
                   progress=lambda *_: next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL))
"""


def processes():
    """The parent and the session of each process that has not ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent), int(session)
    return found


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(source, out, tokenizer, after_batches, jobs=1):
    command = [sys.executable, "-c", KILLED, source, out, tokenizer, str(after_batches), str(jobs)]
    with subprocess.Popen(command, start_new_session=True) as process:
        assert process.wait() == -signal.SIGKILL
    # the processes that encode end by themselves
    wait_until(lambda: all(session != process.pid for _, session in processes().values()))
    assert not out.exists()
    (partial,) = out.parent.glob(".*.partial")
    return partial


@pytest.fixture
def encoded(monkeypatch):
    """The number of documents that this process has encoded in each batch."""
    counts, encode_batch = [], TextEncoder.encode_batch
    monkeypatch.setattr(
        TextEncoder, "encode_batch", lambda self, texts: [counts.append(len(texts)), encode_batch(self, texts)][1]
    )
    return counts


@pytest.mark.slow
def test_prepare_that_is_killed_again_and_again_gives_the_same_bytes_and_encodes_no_finished_shard_twice(
    corpus, tokenizer_file, tmp_path, encoded
):
    out = tmp_path / "out" / "tokens"
    done = set()
    for after_batches in (3, 12, 20, 12):
        partial = kill(corpus, out, tokenizer_file, after_batches)
        now = {path.name for path in partial.glob("*.done")}
        assert now >= done
        done = now
    assert len(done) > 5
    run(corpus, out, tokenizer_file, shard_tokens=300)
    num_encoded = sum(encoded)
    encoded.clear()
    run(corpus, tmp_path / "again", tokenizer_file, shard_tokens=300)
    assert num_encoded < 0.7 * sum(encoded)
    assert list(out.parent.iterdir()) == [out]
    assert contents(out) == contents(tmp_path / "again")


def test_prepare_after_a_kill_makes_a_damaged_shard_again(corpus, tokenizer_file, tmp_path):
    partial = kill(corpus, tmp_path / "tokens", tokenizer_file, 20)
    shard = partial / "train-00001.ds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    run(corpus, tmp_path / "tokens", tokenizer_file, shard_tokens=300)
    run(corpus, tmp_path / "again", tokenizer_file, shard_tokens=300)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "again")


def test_prepare_after_a_kill_with_other_options_starts_from_the_beginning(corpus, tokenizer_file, tmp_path):
    kill(corpus, tmp_path / "tokens", tokenizer_file, 20)
    run(corpus, tmp_path / "tokens", tokenizer_file, shard_tokens=301)
    run(corpus, tmp_path / "again", tokenizer_file, shard_tokens=301)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "again")


@pytest.mark.parametrize("change", ["another document", "fewer documents"])
def test_prepare_after_a_kill_of_a_source_that_changed_is_a_data_error_and_then_starts_from_the_beginning(
    corpus, tokenizer_file, tmp_path, fails, change
):
    changed = shutil.copytree(corpus, tmp_path / "corpus")
    kill(changed, tmp_path / "tokens", tokenizer_file, 20)
    if change == "another document":
        (changed / "000.txt").write_text("something else")
    else:
        for path in sorted(changed.iterdir())[10:]:
            path.unlink()
    with fails(3, "the interrupted run read"):
        run(changed, tmp_path / "tokens", tokenizer_file, shard_tokens=300)
    run(changed, tmp_path / "tokens", tokenizer_file, shard_tokens=300)
    run(changed, tmp_path / "again", tokenizer_file, shard_tokens=300)
    assert contents(tmp_path / "tokens") == contents(tmp_path / "again")
