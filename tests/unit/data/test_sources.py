import bz2
import gzip
import hashlib
import json
import lzma
import os
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from metatokens.data.source_files import survey_source
from metatokens.data.sources import SourceCounts, SourceOptions, iterate_documents, source_files
from metatokens.errors import DataError


def read(path, **options):
    counts = SourceCounts()
    documents = list(iterate_documents(str(path), SourceOptions(**options), counts))
    return documents, counts


def texts_of(path, **options):
    return [document.text for document in read(path, **options)[0]]


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_text_file_is_one_document_in_any_compression(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix]("  héllo\r\n\n".encode()))
    (document,) = iterate_documents(str(path))
    assert document == ("  héllo\r\n\n", path.name)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".JSONL", ".json"])
def test_jsonl_line_is_one_document_named_by_its_row(tmp_path, kind, suffix):
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "one"}\n\n{"text": "two", "id": 7}'))
    assert list(iterate_documents(str(path))) == [("one", f"{path.name}, row 1"), ("two", f"{path.name}, row 3")]


@pytest.mark.parametrize("content", ['[{"text": "one"}, {"text": "two"}]', '[\n {"text": "one"},\n {"text": "two"}\n]'])
def test_json_array_is_one_document_an_element(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert list(iterate_documents(str(tmp_path))) == [("one", "a.json, row 1"), ("two", "a.json, row 2")]


def test_json_object_over_several_lines_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "id": 1}, indent=1))
    assert texts_of(tmp_path / "a.json") == ["one"]


@pytest.mark.parametrize("content", ["[1, 2", "3", '"text"', "", '[{"text": "x"}, 5]'])
def test_json_that_holds_no_rows_is_a_data_error(tmp_path, fails, content):
    (tmp_path / "a.json").write_text(content)
    with fails(3, "a.json", "JSON"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_parquet_row_is_one_document_from_the_chosen_column_of_text_or_bytes(tmp_path, kind):
    column = pa.array(["one", "zwö"]).cast(kind)
    pq.write_table(pa.table({"body": column, "tags": [["a"], ["b", "c"]]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_field="body") == ["one", "zwö"]


def test_a_parquet_column_of_lists_is_no_text_and_the_file_is_not_called_damaged(tmp_path, fails):
    pq.write_table(pa.table({"text": [["a", "b"]]}), tmp_path / "a.parquet")
    with fails(3, "a.parquet", "text in 'text'", "list<", "set text_field"):
        read(tmp_path)


def test_zstd_with_a_long_window_and_skippable_frames_is_read(tmp_path):
    long = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.txt.zst").write_bytes(skippable + packer.compress(b"text") + packer.flush() + skippable)
    assert texts_of(tmp_path) == ["text"]


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert texts_of(path) == ["one two"]


def test_folder_is_read_in_the_order_of_its_paths_without_hidden_or_other_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", ".hidden/x.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a/b.txt", "a/z.txt", "b.txt"]
    assert [document.source for document in read(tmp_path)[0]] == ["a/b.txt", "a/z.txt", "b.txt"]


def test_what_a_folder_holds_and_is_not_read_is_counted_and_named(tmp_path):
    for name in ("a.TXT", "notes.md", "x.jsonl.lz4", "about.json", ".hidden.txt", "in/b.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "corpus" / name).write_text("x")
    for number in range(5):
        (tmp_path / "corpus" / f"{number}.pdf").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "corpus" / "gone.txt").symlink_to(tmp_path / "gone.txt")
    found = survey_source(str(tmp_path / "corpus"))
    assert [path.name for path in found.files] == ["a.TXT", "b.txt"]
    assert set(found.left_out) == {
        "1 x .json file beside other text ('about.json')",
        "1 x broken link or special file ('gone.txt')",
        "7 x file of another kind ('0.pdf', '1.pdf', '2.pdf', ...)",
        "1 x linked folder ('more')",
    }
    with pytest.warns(UserWarning, match="left out of .*corpus: .*linked folder"):
        assert source_files(str(tmp_path / "corpus")) == list(found.files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads anything; runs as any other user")
def test_unreadable_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "locked").mkdir(mode=0)
    assert survey_source(str(tmp_path)).left_out == ("1 x unreadable folder ('locked')",)


def test_json_files_alone_in_a_folder_are_its_text(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}]')
    assert texts_of(tmp_path) == ["one"]
    assert survey_source(str(tmp_path)).left_out == ()


@pytest.mark.parametrize(
    ("name", "content", "option"),
    [
        ("a.jsonl", b'{"body": "x"}', "text_field"),
        ("a.jsonl", b'{"text": 3}', "text_field"),
        ("a.txt", b"\xef\xbb\xbfx", "on_bad_text"),
        ("a.txt.gz", gzip.compress(b" " * (65 << 20)), "max_document_bytes"),
    ],
)
def test_a_remedy_names_an_option_only_to_a_caller_who_passes_options(tmp_path, name, content, option):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=option):
        list(iterate_documents(str(tmp_path), SourceOptions()))
    with pytest.raises(DataError) as caught:
        list(iterate_documents(str(tmp_path)))
    assert option not in str(caught.value)


def test_empty_documents_are_counted_and_left_out_while_whitespace_stays(tmp_path):
    documents, counts = read(write_jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"}, {"text": "x"}))
    assert [document.text for document in documents] == [" \n", "x"]
    assert (counts.documents, counts.empty) == (2, 1)


def test_max_documents_stops_the_reading(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(5)))
    assert texts_of(tmp_path / "a.jsonl", max_documents=2) == ["0", "1"]


def test_reading_no_document_is_a_usage_error(fails):
    with fails(2, "max_documents", 0):
        SourceOptions(max_documents=0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"ab\xffc", "0xff at byte offset 2"),
        ("é\0".encode(), "U+0000 at byte offset 2"),
        (b"\xef\xbb\xbfab", "U+FEFF at byte offset 0"),
        (b"\xed\xa0\x80", "byte offset 0"),
    ],
)
def test_bad_text_is_a_data_error_with_file_and_byte(tmp_path, fails, content, found):
    (tmp_path / "a.txt").write_bytes(content)
    with fails(3, "a.txt", found, "on_bad_text"):
        read(tmp_path)


def test_lone_surrogate_of_a_json_escape_is_a_data_error_with_its_row(tmp_path, fails):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "x\\ud800"}\n')
    with fails(3, "row 2", "U+D800 at byte offset 1"):
        read(tmp_path)


def test_invalid_utf8_in_a_parquet_column_is_a_data_error_with_its_row(tmp_path, fails):
    binary = pa.array([b"fine", b"\xff"], pa.binary())
    column = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with fails(3, "row 2", "0xff"):
        read(tmp_path)


def test_bad_text_is_replaced_and_counted_on_request(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xffb\0")
    documents, counts = read(tmp_path, on_bad_text="replace")
    assert [document.text for document in documents] == ["a\ufffdb\ufffd"]
    assert counts.replaced == 1


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path):
    rows = [json.dumps({"text": str(i)}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{oops", '{"other": 1}']))
    documents, counts = read(tmp_path, on_bad_text="skip")
    assert (len(documents), counts.skipped) == (200, 2)


def test_skipping_more_than_one_percent_is_a_data_error(tmp_path, fails):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 98 + "{oops\n" * 2)
    with fails(3, "2 of 100"):
        read(tmp_path, on_bad_text="skip")


@pytest.mark.parametrize(
    ("row", "found"), [("{oops", "row 2"), ("[1]", "list"), ('{"body": "x"}', "body"), ('{"text": 3}', "int")]
)
def test_malformed_row_is_a_data_error_with_its_number(tmp_path, fails, row, found):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{row}\n')
    with fails(3, "a.jsonl, row 2", found):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "found"),
    [({"body": ["x"]}, "body"), ({"text": [1]}, "int64"), ({"text": ["x", None]}, "row 2")],
)
def test_parquet_without_text_is_a_data_error(tmp_path, fails, columns, found):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with fails(3, "a.parquet", found):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzip.compress(b"text" * 999)[:-9]),
        ("a.txt.gz", b"no gzip at all"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 999)[:-3]),
        ("a.txt.zst", b"no zstd at all"),
        ("a.parquet", b"no parquet at all"),
    ],
    # named, not made from the bytes: gzip writes the time into its header, and every worker must collect the same
    ids=["gzip cut off", "no gzip", "zstd cut off", "no zstd", "no parquet"],
)
def test_broken_archive_is_a_data_error_with_its_name(tmp_path, fails, name, content):
    (tmp_path / name).write_bytes(content)
    with fails(3, name):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_archive_without_a_byte_is_a_data_error(tmp_path, suffix):
    (tmp_path / f"text.txt{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match="no byte at all"):
        list(iterate_documents(str(tmp_path)))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_document_over_the_limit_is_a_data_error_before_it_fills_the_memory(tmp_path, fails, name):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(f".{name.rpartition('.')[2]}", bytes)
    (tmp_path / name).write_bytes(pack(b" " * 5_000_000))
    with fails(3, name, "1000 bytes", "max_document_bytes"):
        read(tmp_path, max_document_bytes=1000)


def test_long_rows_over_many_chunks_are_read_whole(tmp_path):
    rows = [{"text": "ab" * 900_000}, {"text": "c"}]
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", *rows)) == [row["text"] for row in rows]


@pytest.mark.parametrize("source", ["nowhere.txt", "owner/no-such-dataset"])
def test_missing_source_is_a_data_error_that_says_what_is_possible(tmp_path, monkeypatch, fails, source):
    monkeypatch.chdir(tmp_path)
    with fails(3, source, "python-docs"):
        list(iterate_documents(source))


@pytest.mark.parametrize("source", ["books/missing.txt", "books/missing", "nowhere/missing.jsonl.gz", "./missing"])
def test_a_name_that_can_only_be_a_path_is_not_looked_for_on_the_network(tmp_path, monkeypatch, fails, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with fails(3, source, "no such file"):
        list(iterate_documents(source))
    with fails(3, source, "no such file"):
        source_files(source)


def test_folder_without_supported_files_is_a_data_error(tmp_path, fails):
    (tmp_path / "a.pdf").write_text("x")
    with fails(3, tmp_path, ".parquet"):
        read(tmp_path)


def test_missing_package_is_a_usage_error_with_the_command_that_installs_it(tmp_path, monkeypatch, fails):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with fails(2, "zstandard", "pip install 'metatokens[data]'"):
        read(tmp_path)


def test_python_docs_are_topics_and_docstrings_in_a_fixed_order():
    first, again = (list(islice(iterate_documents("python-docs"), 120)) for _ in range(2))
    assert first == again
    assert first[0].source.startswith("pydoc_data.topics, ")
    assert any(document.source == "python/abc.py" for document in first)
    assert len({document.source for document in first}) == 120
    assert source_files("python-docs") == []


def test_an_archive_of_blank_lines_is_refused_before_it_takes_hours(tmp_path, fails):
    for name in ("a.jsonl.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\n" * 5_000_000))
        with fails(3, name, "row 1001", "1000 bytes"):
            read(tmp_path / name, max_document_bytes=1000)


def test_some_blank_lines_between_rows_are_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((b"\n" * 900 + b'{"text": "a"}\n') * 3)
    assert texts_of(tmp_path / "a.jsonl", max_document_bytes=1000) == ["a"] * 3


@pytest.mark.parametrize("name", ["a.parquet.sha256", "SHA256SUMS"])
def test_a_file_that_differs_from_the_digest_beside_it_is_a_data_error(tmp_path, fails, name):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / name).write_text(f"{'0' * 64}  b.parquet\n{digest} *a.parquet\n")
    assert texts_of(tmp_path) == ["one"]
    pq.write_table(pa.table({"text": ["two"]}), path)
    with fails(3, "a.parquet", f"the SHA-256 {digest} that stands beside it"):
        texts_of(tmp_path)
    (tmp_path / name).write_text("no digest\n")
    with fails(3, f"{name}, row 1", "a line of sha256sum"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("part/a.txt.sha256", "/elsewhere/part/a.txt"),
        ("part/a.txt.sha256", "part/a.txt"),
        ("SHA256SUMS", "./part/a.txt"),
    ],
)
def test_a_digest_that_names_folders_is_compared(tmp_path, fails, name, listed):
    path = tmp_path / "part" / "a.txt"
    path.parent.mkdir()
    path.write_text("one")
    (tmp_path / name).write_text(f"{hashlib.sha256(b'one').hexdigest()}  {listed}\n")
    assert texts_of(tmp_path) == ["one"]
    path.write_text("two")
    with fails(3, "a.txt", "that stands beside it"):
        texts_of(tmp_path)


@pytest.mark.parametrize("content", ["", f"{'0' * 64}  b.txt\n"])
def test_a_digest_of_a_file_itself_that_is_for_no_file_or_another_is_a_data_error(tmp_path, fails, content):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt.sha256").write_text(content)
    with fails(3, "a.txt.sha256", "the SHA-256 of a.txt"):
        texts_of(tmp_path)


def test_a_parquet_page_that_differs_from_its_own_checksum_is_a_data_error(tmp_path, fails):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a long word"]}), path, write_page_checksum=True, compression="none")
    path.write_bytes(path.read_bytes().replace(b"a long word", b"a lonG word", 1))
    with fails(3, "a.parquet", "CRC checksum verification failed"):
        texts_of(path)
