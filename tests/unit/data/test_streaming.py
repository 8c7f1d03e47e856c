"""Streaming a dataset by its id, through `datasets` and HTTP, from a hub of one dataset on this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

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


WHOLE = ("owner/name", {"text_field": "body"})
CUT = ("owner/name", {"text_field": "body", "max_documents": 1})
MISSING = (
    (("owner/name", {}), "owner/name, row 1: expected the text in 'text', found only body"),
    (("owner/name", {"split": "test"}), "test"),
    (("owner/other", {}), "owner/other"),
)
READER = """
import json, sys
from metatokens.data.sources import SourceOptions, iterate_documents
from metatokens.errors import DataError
for source, options in json.loads(sys.argv[1]):
    try:
        found = list(iterate_documents(source, SourceOptions(**options)))
    except DataError as error:
        found = str(error)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process whose hub is this one finds under every request, or its DataError: the library loads slowly."""
    requests, home = [WHOLE, CUT, *(request for request, _ in MISSING)], tmp_path_factory.mktemp("home")
    # the library reads these when it is imported
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", READER, json.dumps(requests)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(map(json.dumps, requests), answers, strict=True))


def test_a_dataset_is_streamed_document_by_document_with_its_rows(found: dict[str, Any]) -> None:
    expected = [["one héllo", "owner/name, row 1"], ["two", "owner/name, row 2"]]
    expected.append(["three <|endoftext|>", "owner/name, row 4"])  # row 3 is empty
    assert found[json.dumps(WHOLE)] == expected


def test_a_streamed_dataset_can_be_cut_short(found: dict[str, Any]) -> None:
    assert [text for text, _ in found[json.dumps(CUT)]] == ["one héllo"]


@pytest.mark.parametrize(("asked", "named"), MISSING, ids=["field", "split", "dataset"])
def test_what_a_hub_does_not_have_is_a_data_error(found: dict[str, Any], asked: Any, named: str) -> None:
    error = found[json.dumps(asked)]
    assert isinstance(error, str)
    assert named in error
