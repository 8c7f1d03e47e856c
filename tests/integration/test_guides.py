"""The Python of the guides to the inside of a model acts on meta-tokens, and on nothing before them."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from metatokens.lens import Lens, edits, lens
from metatokens.model.export import save_model
from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]

EXAMPLES = {
    "guide/analysis": (ROOT / "docs/guide/analysis.md").read_text(),
    "guide/interventions": (ROOT / "docs/guide/interventions.md").read_text(),
    "lens": "```python\n" + re.findall(r"((?:^    .*\n)+)", str(lens.__doc__), re.MULTILINE)[0] + "```",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_python_of_a_guide_runs_on_meta_tokens_that_matter(example, tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=4)
    for run in ("copying", "run"):  # what the guides call them
        save_model(model, tmp_path / run / "model")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(map(textwrap.dedent, re.findall(r"```python\n(.*?)```", EXAMPLES[example], re.DOTALL)))
    names = {"model": model, "torch": torch, "Lens": Lens, "edits": edits}
    exec(code, names)
    model, ids = names["model"], names["ids" if "ids" in names else "input_ids"]
    assert (ids == model.config.meta_token_id).any()
    with torch.no_grad():
        unchanged = model(ids).logits
        changed = names["without" if "without" in names else "logits"]
    assert not torch.equal(changed, unchanged)
    assert_close_where_no_meta_token_is_seen(changed, unchanged, ids == model.config.meta_token_id)


def assert_close_where_no_meta_token_is_seen(changed, unchanged, is_meta):
    before = is_meta.cumsum(dim=1) == 0
    assert before.any()
    torch.testing.assert_close(changed[before], unchanged[before])
