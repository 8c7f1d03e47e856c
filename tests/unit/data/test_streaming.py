"""Streaming a dataset by its id, through `datasets` and HTTP, from a hub of one dataset on this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0" * 40
TEXTS = ["one héllo", "two", "", "three <|endoftext|>"]
FILES = {"train.jsonl": "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()}


class Hub(BaseHTTPRequestHandler):
    """What `datasets` asks of https://huggingface.co about a dataset of plain files."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if "/resolve/" in path and name in FILES:
            self._reply(200, FILES[name], {"ETag": '"1"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            entries = [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in FILES.items()]
            self._reply(200, json.dumps(entries).encode())
        elif path.startswith("/api/datasets/owner/name"):
            about = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": p} for p in FILES]}
            self._reply(200, json.dumps(about).encode())
        else:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound" if "/owner/name" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def _reply(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content = content[int(part[1]) : int(part[2]) + 1]
            code, headers = 206, {**(headers or {}), "Content-Range": f"bytes {part[1]}-{part[2]}/*"}
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def documents(hub: str, home: Path, source: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Print the documents of a source in a process whose hub is this one, as JSON lines."""
    code = """if True:
        import json, sys
        from metatokens.data.sources import SourceOptions, iterate_documents
        for document in iterate_documents(sys.argv[1], SourceOptions(**json.loads(sys.argv[2]))):
            print(json.dumps(document))
    """
    # the library reads these when it is imported
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, source, json.dumps(options)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=120)


def test_a_dataset_is_streamed_document_by_document_with_its_rows(hub: str, tmp_path: Path) -> None:
    done = documents(hub, tmp_path, "owner/name", text_field="body")
    assert done.returncode == 0, done.stderr
    expected = [["one héllo", "owner/name, row 1"], ["two", "owner/name, row 2"]]
    expected.append(["three <|endoftext|>", "owner/name, row 4"])  # row 3 is empty
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_a_streamed_dataset_can_be_cut_short(hub: str, tmp_path: Path) -> None:
    done = documents(hub, tmp_path, "owner/name", text_field="body", max_documents=1)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)[0] for line in done.stdout.splitlines()] == ["one héllo"]


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("owner/name", {}, "owner/name, row 1: expected the text in 'text', found only body"),
        ("owner/name", {"split": "test"}, "test"),
        ("owner/other", {}, "owner/other"),
    ],
)
def test_what_a_hub_does_not_have_is_a_data_error(
    hub: str, tmp_path: Path, source: str, options: dict[str, object], named: str
) -> None:
    done = documents(hub, tmp_path, source, **options)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("metatokens.errors.DataError: ")
    assert named in last
