"""The README's Python runs as it stands, and its commands name verbs and flags that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metatokens.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()
TINY = """
extends: tiny/meta
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}
data: {block_size: 64}
training: {duration: {kind: steps, steps: 4}, batch_blocks: 8, micro_batch_blocks: 8}
evaluation: {interval_steps: null}
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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("The square of 7")


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
