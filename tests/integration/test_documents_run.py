"""Every Python block and every command of README and docs runs, at a small size and in the order of its page."""

import gzip
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from commands import metatokens
from long_texts import byte_tokenizer, write_model, write_stories
from metatokens.data.tokenizer import build_hf_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what a page takes for granted, by what stands in its place here
PROVIDED = {
    "run": ("run", "demo/meta", "runs/tiny/meta", "runs/paper/meta-rope-152m", "runs/alibi"),
    "copying": (
        "copying",
        "demo/recall/meta-attention",
        "runs/copying",
        "runs/8k-to-8k",
        *(f"runs/seed-{seed}" for seed in range(3)),
    ),
    "tokens": ("tokens", "c4", "openwebtext", "tokenized"),
    "held-out": ("held-out",),  # of other text: no text may be in both splits
    "run/model": ("gpt2",),
    "gpt2": ("path/to/gpt2",),
    "books": ("books",),
    "books/0.txt": ("test.txt",),
    "run-memory": ("run-memory",),
    "doc.txt": ("doc.txt",),
    "articles.jsonl.gz": ("articles.jsonl.gz",),
    "experiments": ("experiments",),
    "llm": ("llm",),
    "babi": ("babi",),
}


@pytest.fixture(scope="module")
def docs() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "docs"))
    import blocks

    yield blocks
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def made(docs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, a language model and a copying model, which the pages share."""
    folder = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "books").mkdir()
    for number in range(10):
        text = " ".join(f"Line {line} of book {number} says that {line * number} is a number." for line in range(150))
        (folder / "books" / f"{number}.txt").write_text(text)
    (folder / "doc.txt").write_text("Line 3 of book 2 says that 6 is a number.")
    with gzip.open(folder / "articles.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": f"Article {number} has a body. " * 20}) + "\n" for number in range(20))
    (folder / "experiments").symlink_to(ROOT / "experiments")
    build_hf_tokenizer(byte_tokenizer()).save_pretrained(write_model(folder / "llm"))
    write_stories(folder / "babi")
    for command in (
        "metatokens prepare books --out tokens --validation-fraction 0.2",
        "metatokens prepare doc.txt --tokenizer tokens/tokenizer.json --out held-out",
        "metatokens pretrain tiny/meta --data.path tokens --out run",
        "metatokens pretrain tiny/memory --data.path tokens --out run-memory",
        "metatokens finetune tiny/recall --out copying",
    ):
        metatokens(*docs.smaller(command, folder)[1:])
    vocab_size = json.loads((folder / "run/model/config.json").read_text())["meta_token_id"]
    config = GPT2Config(vocab_size=vocab_size, n_positions=160, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    shutil.copy(folder / "tokens/tokenizer.json", folder / "gpt2")
    os.chdir(before)
    return folder


def provide(made: Path, folder: Path, block: Any) -> None:
    """Put the files there that a block reads and the page has not made."""
    text = re.sub(r"--out \S+", "", block.text)
    before = "[\"']" if block.kind == "python" else r"[\s='\"]"  # in Python a path is in quotes
    for source, names in PROVIDED.items():
        for name in names:
            path = folder / name
            if re.search(rf"{before}{re.escape(name)}(?![\w-])", text) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                if source == "experiments":
                    path.symlink_to(made / source)
                else:
                    (shutil.copytree if (made / source).is_dir() else shutil.copy)(made / source, path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("page", [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES])
def test_every_block_of_a_page_runs(page, docs, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs.run(page, tmp_path, provide=lambda block: provide(made, tmp_path, block))


def test_what_does_not_run_stands_in_a_page(docs):
    commands = [block.text for page in PAGES for block in docs.blocks(page.read_text()) if block.kind != "yaml"]
    for start in (*docs.NOT_RUN, *docs.PLANNED):
        assert any(command.startswith(start) for command in commands), start
    assert len([command for command in commands if not docs.reason_not_to_run(command)]) > len(commands) / 2


def test_a_page_whose_command_fails_is_an_error_that_names_its_line(docs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("# A page\n\n    metatokens generate no-such-run text\n")
    with pytest.raises(RuntimeError, match=r"page\.md, line 3: exit code 4"):
        docs.run(tmp_path / "page.md", tmp_path)
