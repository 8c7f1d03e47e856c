"""The bounds of pyproject.toml are releases that continuous integration runs: those of the folder constraints."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
TRANSFORMERS = REQUIREMENTS["transformers"].specifier


def pins(name: str) -> dict[str, Version]:
    """Return the releases of constraints/`name`.txt."""
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pinned}


@pytest.mark.parametrize("constraints", ["floor", "pinned", "newest"])
def test_every_dependency_is_tested_within_its_bounds(constraints: str) -> None:
    pinned = pins(constraints)
    assert {name for name, required in REQUIREMENTS.items() if pinned[name] not in required.specifier} == set()


def test_lower_bound_of_a_dependency_is_the_oldest_release_tested() -> None:
    floors = {
        name: [Version(s.version) for s in required.specifier if s.operator == ">="]
        for name, required in REQUIREMENTS.items()
    }
    assert floors == {name: [pins("floor")[name]] for name in REQUIREMENTS}


def test_code_that_travels_with_a_checkpoint_has_the_same_lower_bound() -> None:
    code = (ROOT / "src" / "metatokens" / "model" / "compatibility.py").read_text(encoding="utf-8")
    (required,) = re.findall(r'require_version\("transformers>=([\d.]+)"', code)
    assert Version(required) == pins("floor")["transformers"]


def test_upper_bound_of_transformers_lets_in_patches_of_the_newest_release_tested_and_nothing_later() -> None:
    newest = pins("newest")["transformers"]
    assert [Version(s.version) for s in TRANSFORMERS if s.operator == "<"] == [
        Version(f"{newest.major}.{newest.minor + 1}")
    ]


def test_both_names_of_the_cache_are_tested() -> None:
    # the name changed with 5.24
    assert pins("pinned")["transformers"] < Version("5.24") <= pins("newest")["transformers"]


def test_releases_that_make_test_versions_runs_have_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (prerequisites,) = re.findall(r"^test-versions: ([^#]*)", makefile, re.MULTILINE)
    named = {name.removeprefix("test-") for name in prerequisites.split()}
    assert named | {"pinned"} == {path.stem for path in (ROOT / "constraints").glob("*.txt")}
