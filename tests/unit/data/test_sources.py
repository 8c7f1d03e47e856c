import gzip
import json
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from metatokens.data.sources import SourceCounts, SourceOptions, iterate_documents, source_files


def read(path, **options):
    counts = SourceCounts()
    documents = list(iterate_documents(str(path), SourceOptions(**options), counts))
    return documents, counts


def texts_of(path, **options):
    return [document.text for document in read(path, **options)[0]]


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_file_is_one_document_in_any_compression(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack("  héllo\r\n\n".encode()))
    (document,) = iterate_documents(str(path))
    assert document == ("  héllo\r\n\n", path.name)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_line_is_one_document_named_by_its_row(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b'{"text": "one"}\n\n{"text": "two", "id": 7}'))
    assert list(iterate_documents(str(path))) == [("one", f"{path.name}, row 1"), ("two", f"{path.name}, row 3")]


def test_parquet_row_is_one_document_from_the_chosen_column(tmp_path):
    pq.write_table(pa.table({"body": ["one", "two"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", text_field="body") == ["one", "two"]


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
