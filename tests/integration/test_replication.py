"""A replication of seconds, in real processes: every kind of step, skipped when it is done, and texts of the user."""

import json
from pathlib import Path

import pytest

from commands import error_line, metatokens

PLAN = """
purpose: a test
text_vocab_size: 300
parts:
  - name: texts
    question: what does a block cost?
    needs_books: true
    steps:
      - {run: "prepare train --out tokens --vocab-size 300 --validation-fraction 0.3", creates: tokens/manifest.json}
      - {run: "sweep {files}/texts.yaml --out pretrained"}
  - name: windows
    question: is a longer window asked?
    steps:
      - each: {factor: [2]}
        run: "extend pretrained/runs/meta/seed-0 --factor {factor} --no-training --out x{factor}/seed-0"
        creates: "x{factor}/seed-0"
      - run: >-
          evaluate x2/seed-* --task "{kind: parity}" --size "[1, 1]" --instances 8 --lengths "[30-80]"
        writes: asked.json
      - {run: "sweep {files}/recall.yaml --out recalled"}
"""
TEXTS = """
training: pretrain
preset: pretrain.yaml
axes: {arm: {meta: }}
seeds: [0]
evaluations: [{name: books, ask: {text: test, window: 56, max_tokens: 60}}]
"""
PRETRAIN = """
extends: tiny/meta
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {path: tokens, block_size: 64}
training: {duration: {kind: steps, steps: 2}, batch_blocks: 2, micro_batch_blocks: 2, device: cpu}
schedule: {warmup_steps: 1}
evaluation: {interval_steps: off}
"""
RECALL = """
preset: finetune.yaml
axes: {arm: {meta: }}
seeds: [0]
evaluations: [{name: lengths, ask: {lengths: [30-80], instances: 8}}]
"""
FINETUNE = """
extends: tiny/recall
start: {kind: checkpoint, path: "x2/seed-{seed}"}
task: {kind: parity, questions: 1}
curriculum: [{steps: 2, size: [1, 1], prompt_tokens: [20, 80]}]
training: {batch_blocks: 2, micro_batch_blocks: 2, device: cpu}
schedule: {warmup_steps: 1}
evaluation: {interval_steps: off}
"""
WORDS = "the quick brown fox jumps over the lazy dog while twelve grey geese look on and say nothing at all. "


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    folder = tmp_path / "scale"
    folder.mkdir()
    files = {"plan": PLAN, "texts": TEXTS, "pretrain": PRETRAIN, "recall": RECALL, "finetune": FINETUNE}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    for part in ("train", "test"):
        (tmp_path / "books" / part).mkdir(parents=True)
        for number in range(12):
            (tmp_path / "books" / part / f"{number}.txt").write_text(f"Book {number} {part}. " + 8 * WORDS)
    return folder


@pytest.mark.long
def test_a_replication_runs_every_step_once_and_gathers_the_tables(scale: Path, tmp_path: Path) -> None:
    command = ("replicate", "--scale", scale, "--out", tmp_path / "out", "--books", tmp_path / "books")
    planned = json.loads(metatokens(*command, "--dry-run", "--json").stdout)
    assert [(part["name"], part["trainings"], part["to_do"]) for part in planned["parts"]] == [
        ("texts", 1, 1),
        ("windows", 1, 1),
    ]
    assert not (tmp_path / "out").exists()

    done = metatokens(*command)
    summary = Path(done.stdout.strip()).read_text()
    assert "# texts: what does a block cost?" in summary
    assert "| meta |" in summary
    assert (tmp_path / "out" / "pretrained" / "figures" / "losses-books.png").is_file()
    asked = json.loads((tmp_path / "out" / "asked.json").read_text())["rows"][0]["sequence_accuracy"]["estimate"]
    assert "| asked | models | 30-80 tokens |" in summary
    assert f"| asked | 1 | {100 * asked:.1f}% (" in summary

    again = metatokens(*command)
    assert "0 of 1 trainings to do" in again.stderr
    assert "extend" not in again.stderr
    assert "prepare" not in again.stderr

    (tmp_path / "out" / "replication.md").unlink()
    metatokens(*command, "--tables")
    assert (tmp_path / "out" / "replication.md").read_text() == summary


def test_a_part_that_needs_books_says_so_before_anything_runs(scale: Path, tmp_path: Path) -> None:
    line = error_line("replicate", "--scale", scale, "--out", tmp_path / "out", "--part", "texts", "--json", code=2)
    assert "--books" in line
    assert "part texts needs" in line
    assert not (tmp_path / "out").exists()
