"""A hook of MkDocs: the site shows the repository's other pages too, and every file that a page links to.

README.md is the start page. A file of the repository outside of docs/ keeps its path on the site, so links between
pages hold there as they do in the repository. A link to a folder with the results of an analysis leads to its page,
which is drawn here. The comments after quoted numbers, which `make facts` reads, are left out.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from metatokens.analysis.results import RESULTS_NAME, read_results
from metatokens.report.page import PAGE_NAME, render_page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)#\s]+)([)#])")
_COMMENT = re.compile(r"<!-- .*? -->", re.DOTALL)
_CODE = re.compile(r"^```.*?^```|^ {4}[^\n]*$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages outside of docs/, and the files that any page links to."""
    waiting = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    waiting += [Path(file.abs_src_path) for file in files.documentation_pages()]
    seen = set()
    while waiting:
        path = waiting.pop()
        is_analysis = path.name == PAGE_NAME and (path.parent / RESULTS_NAME).is_file()
        if path in seen or not (is_analysis or path.is_file()):
            continue
        seen.add(path)
        uri = _site_path(path)
        if is_analysis:
            files.append(File.generated(config, uri, content=render_page(*read_results(path.parent))))
        elif files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            text = _CODE.sub("", path.read_text(encoding="utf-8"))
            waiting += [_target(path, match[2]) for match in _LINK.finditer(text) if ":" not in match[2]]
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Leave out the comments, and let links go where their files are on the site."""
    del config, files
    source = Path(page.file.abs_src_path)

    def on_site(match: re.Match[str]) -> str:
        if ":" in match[2]:
            return match[0]
        target = _site_path(_target(source, match[2]))
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{match[3]}"

    return _LINK.sub(on_site, _COMMENT.sub("", markdown))


def _target(page: Path, link: str) -> Path:
    """Return the file that a link leads to; of a folder with an analysis, its page."""
    path = (page.parent / link).resolve()
    return path / PAGE_NAME if path.is_dir() else path


def _site_path(path: Path) -> str:
    """Return where a file of the repository is on the site; the README of a folder stays a page of its own."""
    inside = path.relative_to(ROOT).as_posix()
    return "index.md" if inside == "README.md" else inside.removeprefix("docs/")
