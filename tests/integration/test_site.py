"""The site of the documents builds without a warning, and its readers need no network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.long
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.glob("*.html"), *(tmp_path / "guide").glob("*.html")]
    assert {"index.html", "tutorial.html", "api.html", "results.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?([^\"\s>]+)", text)
        assert [address for address in loaded if "//" in address] == [], page.name
        assert "<!-- =" not in text  # the sources of numbers
    for name, says in (
        ("parity", "The answer moves item"),
        ("list_recall", "Zeroing"),
        ("books", "resembles the text right before it more"),
    ):
        drawn = (tmp_path / "experiments/tiny-analysis" / name / "report.html").read_text()
        assert says in drawn, "the page of an analysis opens with its findings"
        assert "arrays.npz is not here" in drawn
    assert "inject_into_prompt" in (tmp_path / "api.html").read_text()
