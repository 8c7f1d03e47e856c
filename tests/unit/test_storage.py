"""What is written: refused at the start where it cannot be, whole or not at all, and never lost."""

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metatokens.errors import DataError, MetaTokensError, ResourceError, UsageError
from metatokens.storage import (
    check_file,
    check_folder,
    file_sha256,
    hold_lock,
    json_sha256,
    keep_elsewhere,
    lock_holder,
    read_sealed,
    to_json,
    write_atomically,
    write_sealed,
)

LONG = "x" * 256
BARELY = "x" * 254  # a name that is allowed, and whose temporary one is not


def in_the_way(folder: Path) -> None:
    (folder / "file").write_text("old")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "link-to-folder").symlink_to(folder / "folder")
    (folder / "link-to-file").symlink_to(folder / "file")


@pytest.mark.parametrize(
    ("check", "name", "reason"),
    [
        (check_folder, "file", "Not a directory"),
        (check_folder, "file/new", "Not a directory"),
        (check_folder, "link", "No such file or directory"),
        (check_folder, "link/new", "No such file or directory"),
        (check_folder, LONG, "File name too long"),
        (check_folder, f"new/{LONG}/new", "File name too long"),
        (check_folder, "a\0b", "Invalid argument"),
        (check_file, "folder", "Is a directory"),
        (check_file, ".", "Is a directory"),
        (check_file, "file/new", "Not a directory"),
        (check_file, LONG, "File name too long"),
        (check_file, BARELY, "File name too long"),
        (check_file, "link-to-folder", "Is a directory"),
    ],
)
def test_what_is_in_the_way_is_a_usage_error_and_stays(
    tmp_path: Path, check: Callable[[Path], None], name: str, reason: str
):
    in_the_way(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"that can be written, found {reason}; choose another --out"):
        check(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["folder", "link-to-folder", "new", "new/deep"])
def test_a_folder_that_is_there_or_can_be_made_is_fine(tmp_path: Path, name: str):
    in_the_way(tmp_path)
    check_folder(tmp_path / name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["file", "link", "link-to-file", "new", "new/deep"])
def test_a_file_that_passes_its_check_can_be_written(tmp_path: Path, name: str):
    in_the_way(tmp_path)
    check_file(tmp_path / name)
    assert not (tmp_path / "new").exists()
    keep_elsewhere(tmp_path / name, lambda path: write_atomically(path, "text"))
    assert (tmp_path / name).read_text() == "text"


@pytest.mark.parametrize("name", ["link", "link-to-file"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_points_to_stays(tmp_path: Path, name: str):
    in_the_way(tmp_path)
    before = (tmp_path / "file").read_text()
    target = (tmp_path / name).resolve()
    was_there = target.exists()
    write_atomically(tmp_path / name, "text")
    assert not (tmp_path / name).is_symlink()
    assert (tmp_path / name).read_text() == "text"
    assert (tmp_path / "file").read_text() == before
    assert target.exists() == was_there


def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_stays(tmp_path: Path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "lock").symlink_to("precious")
    held = hold_lock(tmp_path / "lock", folder=tmp_path, work="another run uses this folder")
    with pytest.raises(UsageError, match="expected a folder that can be written"):
        held.__enter__()
    assert (tmp_path / "precious").read_text() == "content"


def test_a_disk_that_is_too_small_is_a_resource_error(tmp_path: Path):
    with pytest.raises(ResourceError, match="expected 1152921504606846976 bytes free"):
        check_folder(tmp_path / "new", num_bytes=2**60)


def test_a_device_takes_a_result_and_stays_a_device():
    check_file(Path("/dev/null"))
    write_atomically(Path("/dev/null"), "text")
    assert not os.path.isfile("/dev/null")


def test_a_result_that_meets_a_full_disk_is_kept_elsewhere_and_named():
    with pytest.raises(ResourceError) as caught:
        keep_elsewhere(Path("/dev/full"), lambda path: write_atomically(path, "result"))
    kept = Path(str(caught.value).rpartition("it is in ")[2])
    assert kept.read_text() == "result"
    kept.unlink()
    kept.parent.rmdir()


def test_json_has_null_and_a_warning_for_what_is_no_number():
    document = {"a": [1.5, math.nan], "b": {"c": -math.inf}, "path": Path("x")}
    with pytest.warns(UserWarning, match=r"null in the JSON: a\[1\] nan, b\.c -inf"):
        text = to_json(document)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None], "b": {"c": None}, "path": "x"}


def test_an_error_of_this_package_keeps_its_own_exit_code(tmp_path: Path):
    def fail(path: Path) -> None:
        raise UsageError(str(path), expected="a", found="b", remedy="c")

    with pytest.raises(MetaTokensError) as caught:
        keep_elsewhere(tmp_path / "new", fail)
    assert caught.value.exit_code == 2


def test_a_lock_is_held_by_one_process_and_names_it(tmp_path: Path):
    lock = tmp_path / "out" / "lock"
    assert lock_holder(lock) == ""
    with hold_lock(lock, folder=tmp_path / "out", work="somebody writes here"):
        assert lock_holder(lock) == f"process {os.getpid()} on {platform.node()}"
        with (
            pytest.raises(UsageError, match=rf"out: somebody writes here \(process {os.getpid()} on "),
            hold_lock(lock, folder=tmp_path / "out", work="somebody writes here"),
        ):
            pass
    assert lock_holder(lock) == ""


def test_a_lock_whose_file_was_removed_by_its_holder_can_be_taken(tmp_path: Path):
    for _ in range(2):
        with hold_lock(tmp_path / "lock", folder=tmp_path, work="somebody writes here"):
            (tmp_path / "lock").unlink()


def test_what_a_killed_writer_left_does_not_stop_the_next(tmp_path: Path):
    (tmp_path / ".results.json.tmp").write_text("half")
    write_atomically(tmp_path / "results.json", "whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"results.json": "whole"}


def test_a_file_is_written_in_a_folder_that_is_not_open_to_reading(tmp_path: Path):
    tmp_path.chmod(0o300)
    write_atomically(tmp_path / "results.json", "whole")
    tmp_path.chmod(0o700)
    assert (tmp_path / "results.json").read_text() == "whole"


def test_digests_are_of_the_bytes_and_of_the_values_whatever_their_order(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "file") == abc
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1}) != json_sha256({"a": 1, "b": [3]})


@pytest.mark.parametrize(
    ("text", "parse"),
    [('{"steps": 4, "word": "ü"}\n', json.loads), ("seed: 1\nmodel:\n  word: ü\n", yaml.safe_load)],
    ids=["JSON", "YAML"],
)
def test_a_sealed_file_with_any_bit_flipped_is_refused(tmp_path: Path, text: str, parse: Callable[[str], Any]):
    path = tmp_path / "file"
    write_sealed(path, text)
    whole = path.read_bytes()
    assert parse(whole.decode()).items() >= parse(text).items()  # it is still a file of its kind
    assert read_sealed(path, remedy="go on") == text
    for position in range(len(whole)):  # the mark of the seal too
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            with pytest.raises(DataError):
                read_sealed(path, remedy="go on")


@pytest.mark.parametrize("text", ['{"steps": 4}\n', "seed: 1\nsize: 2\n"])
def test_a_sealed_file_that_is_cut_off_never_gives_a_part_of_its_text(tmp_path: Path, text: str):
    path = tmp_path / "file"
    write_sealed(path, text)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with contextlib.suppress(DataError):
            found = read_sealed(path, remedy="go on")
            assert any(mark.startswith(found) for mark in ('{"sha256": "', "# sha256 "))


def test_a_sealed_file_that_a_disk_cannot_read_is_named(tmp_path: Path):
    (tmp_path / "file").symlink_to("/proc/self/mem")  # reading its first byte is an EIO
    with pytest.raises(DataError, match=r"file: expected a readable text file, found Input/output error; go on"):
        read_sealed(tmp_path / "file", remedy="go on")
