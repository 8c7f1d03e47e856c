"""What the repository says of itself holds: links, extras, targets of the Makefile, the form of its YAML."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from metatokens.storage import is_sealed, read_sealed

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODE = re.compile(r"^```.*?^```|^ {4}[^\n]*$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[)#]", CODE.sub("", page.read_text()))
    missing = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_every_extra_that_a_text_names_is_one_of_the_project() -> None:
    texts = [*PAGES, *sorted((ROOT / "src").rglob("*.py"))]
    named = {
        extra.strip()
        for text in texts
        for extras in re.findall(r"(?:metatokens|'\.)\[([a-z, ]+)\]'", text.read_text())
        for extra in extras.split(",")
    }
    assert {"data", "report", "trackers", "trainer"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


def test_workflows_call_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= {"test-floor", "test-newest"}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    called = set(workflow["jobs"]["check"]["strategy"]["matrix"]["target"])
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for run in re.findall(r"run: make ([a-z ]+)$", path.read_text(), re.MULTILINE):
            called |= set(run.split())
    assert called >= {"check", "lint", "facts", "test", "docs", "dist"}
    assert called <= targets


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", "mkdocs.yml", ".github/workflows/release.yml"])
def test_a_file_of_settings_is_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


def test_the_seal_of_every_committed_result_is_whole() -> None:
    results = [path for room in ("experiments", "benchmarks") for path in sorted((ROOT / room).rglob("*.json"))]
    sealed = [path for path in results if is_sealed(path)]
    assert sealed
    for path in sealed:
        read_sealed(path, remedy="write it with `metatokens.storage.write_sealed`")


def test_the_version_is_the_same_everywhere() -> None:
    import metatokens

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metatokens.__version__ == PROJECT["version"] == citation["version"]
    assert f"version = {{{PROJECT['version']}}}" in (ROOT / "README.md").read_text()


def test_every_page_of_the_documents_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in settings] == []
