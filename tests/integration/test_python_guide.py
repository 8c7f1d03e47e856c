"""The guide to the Python API and the notebook run as they stand, on a small model of their own."""

import re
import shutil
from pathlib import Path

import pytest

import metatokens as mt
from metatokens.cli import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guide/python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
TINY = """
extends: tiny/meta
injection: {kind: uniform, ratio: 0.2}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 128}
data: {block_size: 128}
training: {duration: {kind: steps, steps: 4}, batch_blocks: 4, micro_batch_blocks: 4}
evaluation: {interval_steps: null}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the demonstration has run."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "squares.txt").write_text("".join(f"The square of {n} is {n * n}.\n" for n in range(300)))
    tokens = str(folder / "tokens")
    prepare = ["prepare", str(folder / "squares.txt"), "--out", tokens, "--validation-fraction", "0"]
    assert main([*prepare, "--vocab-size", "300"]) == 0
    run = str(folder / "demo/meta")
    assert main(["pretrain", str(folder / "tiny.yaml"), "--data.path", tokens, "--out", run]) == 0
    shutil.copytree(run, folder / "demo/recall/meta-attention")  # any model can be asked for its recall
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_every_block_of_the_guide_runs_in_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["lm"].injection == mt.UniformInjection(0.2)  # the run's
    meta_token_id = names["lm"].tokenizer.meta_token_id
    assert meta_token_id in names["ids"]
    assert meta_token_id in names["batch"]["input_ids"]
    assert names["result"].meta_tokens
    assert names["zeroed"].nats_per_token != names["as_trained"].nats_per_token
    assert (folder / "head.png").stat().st_size
    assert "_PAUSE_" in capsys.readouterr().out


def test_the_guide_makes_ten_tries_of_at_most_three_lines_with_the_package():
    tries = re.split(r"^\*\*\d+\. ", GUIDE.split("\n## ")[0], flags=re.MULTILINE)[1:]
    assert len(tries) == 10
    for one in tries:
        block, *plain_pytorch = re.findall(r"```python\n(.*?)```", one, re.DOTALL)
        assert len(block.splitlines()) <= 3
        assert not any("mt." in other for other in plain_pytorch)
