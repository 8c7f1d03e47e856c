"""Every notebook of the docs runs from its first cell to its last, and is kept without what one machine made of it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(name, folder, monkeypatch):
    """Run a notebook in a folder; an error in a cell is raised here."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = read(name)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return [output for cell in code_of(notebook) for output in cell.outputs]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    # numbers and pictures of a training differ in their last digits from one processor to another
    assert not any(cell.outputs or cell.execution_count for cell in code_of(read(name)))


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_shows_its_meta_tokens_what_zeroing_does_and_two_plots(tmp_path, monkeypatch):
    outputs = run("meet_a_meta_token_model", tmp_path, monkeypatch)
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "_PAUSE_" in text
    perplexities = dict(re.findall(r"^ *(as trained|zeroed|without): ([\d.]+)", text, re.MULTILINE))
    assert float(perplexities["zeroed"]) > float(perplexities["as trained"])  # as the text says
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
