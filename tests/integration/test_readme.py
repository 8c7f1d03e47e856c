"""The README's and the guides' Python runs as it stands, with meta-tokens; commands name verbs and flags that exist."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from metatokens.cli import main
from metatokens.lens import Lens, edits, lens
from metatokens.model.export import save_model
from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = """
extends: tiny/meta
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}
data: {block_size: 64}
training: {duration: {kind: steps, steps: 4}, batch_blocks: 8, micro_batch_blocks: 8}
evaluation: {interval_steps: null}
"""

# appended to the README's code: its batches and its prompt hold meta-tokens, without meta-attention logits differ
META_TOKENS_MATTER = """
from metatokens.evaluation.interventions import NoMetaAttention, intervene
meta = ids["meta_token_id"]
assert (collator(rows)["input_ids"] == meta).any(dim=1).all()
assert meta in prompt
with torch.no_grad():
    logits = model(output).logits
    with intervene(model, (NoMetaAttention(),)):
        assert not torch.equal(model(output).logits, logits)
"""


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    text = "".join(f"The square of {n} is {n * n}.\n" for n in range(500))
    (tmp_path / "squares.txt").write_text(text)
    tokens = str(tmp_path / "tokens")
    assert main(["prepare", str(tmp_path / "squares.txt"), "--out", tokens, "--validation-fraction", "0"]) == 0
    run = str(tmp_path / "demo/meta")
    assert main(["pretrain", str(tmp_path / "tiny.yaml"), "--data.path", tokens, "--out", run]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", code + META_TOKENS_MATTER]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()[-1]
    assert "_PAUSE_" in shown
    assert shown.replace("_PAUSE_", "").startswith("The square of 6 is 36, its cube is 216. The square of 7")


EXAMPLES = {
    "guide/analysis": (ROOT / "docs/guide/analysis.md").read_text(),
    "guide/interventions": (ROOT / "docs/guide/interventions.md").read_text(),
    "lens": "```python\n" + re.findall(r"((?:^    .*\n)+)", str(lens.__doc__), re.MULTILINE)[0] + "```",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_python_of_a_guide_runs_on_meta_tokens_that_matter(example, tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=4)
    save_model(model, tmp_path / "copying")  # the run of the guide to recall tasks
    monkeypatch.chdir(tmp_path)
    code = "\n".join(map(textwrap.dedent, re.findall(r"```python\n(.*?)```", EXAMPLES[example], re.DOTALL)))
    names = {"model": model, "torch": torch, "Lens": Lens, "edits": edits}
    exec(code, names)
    ids = names["ids" if "ids" in names else "input_ids"]
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


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"^    metatokens (.*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        verb, *arguments = shlex.split(command)
        flags = {argument for argument in arguments if argument.startswith("--") and "." not in argument}
        help_text = subprocess.run(
            [sys.executable, "-m", "metatokens.cli", verb, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert flags <= set(re.findall(r"--[\w-]+", help_text)), command
