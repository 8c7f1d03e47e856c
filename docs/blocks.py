"""Run every Python block and every command of a page, in its order and at a small size.

Python blocks of a page share one namespace, and all of a page runs in one folder. A YAML block is the file that a
command of the page names. Presets give way to smaller ones that extend them, and large numbers to small ones;
everything else runs as it stands. What cannot run is in `NOT_RUN` with its reason; grids of runs are only planned.

    python docs/blocks.py docs/tutorial.md      # in a temporary folder
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

NOT_RUN = {
    "pip install ": "changes the environment; `make dist` installs the package",
    "torchrun ": "wants GPUs; tests/integration/test_pretraining_distributed.py and test_torchrun.py run two processes",
    "metatokens serve ": "waits for requests; tests/integration/test_everywhere.py sends some",
    "python -m metatokens.evaluation.harness ": "needs lm-eval; tests/integration/test_everywhere.py runs it",
    "from trl import ": "trl is in no extra of the package; docs/compatibility.md says what was tried",
    "metatokens demo --dry-run": "",
    "metatokens demo": "takes minutes; tests/integration/test_demo.py runs it at a small size",
    "metatokens evaluate run --suite long-context": "the small tokenizer of the tests needs more tokens a text",
    "python benchmarks/gpu.py ": "wants a GPU; tests/integration/test_benchmark_scripts.py runs it on the CPU",
    "make test-faults": "takes minutes; continuous integration runs a round of it",
    "python tests/faults/": "takes minutes, or an hour; `make test-faults` runs the same cases",
    "metatokens prepare allenai/c4": "downloads",
    "metatokens graft llm --data.path tokens-llm": "the page of grafts prepares its tokens and runs it",
    "metatokens sweep experiments/": "plans 60 runs; tests/integration/test_sweep_command.py runs a small grid",
    "metatokens finetune paper/recall-gpt-neo": "downloads; test_pretrained_arms.py runs a tiny GPT-Neo",
    "metatokens evaluate runs/gpt-neo": "needs the download before it",
    "metatokens perplexity runs/gpt-neo": "needs the download before it",
}
"""Beginnings of commands and of Python blocks that do not run, and why; the first that fits counts, and an empty reason
lets it run."""
PLANNED = ("metatokens sweep ", "metatokens finetune paper/")
"""Beginnings of commands that run with --dry-run: they make every check and train nothing."""
MODEL = "{hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 2, max_position_embeddings: 160}"
BATCH = "batch_blocks: 4, micro_batch_blocks: 4, precision: float32, compile: false"
SMALLER = {
    "paper/recall": f"""
curriculum: [{{steps: 2, size: [2, 4], prompt_tokens: [1, 64]}}]
training: {{{BATCH}}}
""",
    "recall": f"""
start: {{model: {MODEL.replace("160", "512")}}}
curriculum: [{{steps: 2, size: [2, 4], prompt_tokens: [1, 32]}}]
training: {{{BATCH}}}
test: {{instances: 8}}
""",
    "extend": f"""
schedule: {{warmup_steps: 0, decay_steps: 1}}
training: {{duration: {{steps: 1}}, {BATCH}}}
evaluation: {{interval_steps: null}}
""",
    "graft": f"""
graft: {{window: 12, every: 3, lora_rank: 2}}
data: {{block_size: 64}}
reconstruct: {{tokens: 8, distance: 12}}
sampled_positions: 8
schedule: {{warmup_steps: 0}}
training: {{duration: {{kind: text_tokens, tokens: 500}}, {BATCH}}}
evaluation: {{interval_steps: null}}
""",
    "": f"""
model: {MODEL}
data: {{block_size: 64}}
training: {{duration: {{kind: text_tokens, tokens: 500}}, {BATCH}}}
evaluation: {{interval_steps: null}}
""",
}
"""What a smaller preset changes, by what its name holds."""
SMALLER_NUMBERS = {
    "--training.duration.tokens": "500",
    "--tokens": "500",
    "--instances": "8",
    "--documents": "8",
    "--max-text-tokens": "8",
    "--vocab-size": "600",
    "--validation-fraction": "0.2",
    "--window": "40",
    "--stride": "10",
    "--length": "64",
}
TINY_BENCH = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --vocabulary 100"
FEW = {
    "analyze": "--documents 8 --subject.pairs 8 --parts [attention]",
    "analyze run-graft": "--documents 8",
    "analyze text": "--documents 8 --calibration_documents 1 --parts [attention]",
    "prepare": "--max-documents 40 --vocab-size 600 --validation-fraction 0.2",
    "generate": "--max-text-tokens 8",
    "perplexity": "--window 40 --max-tokens 100",
    "extend": "--preset paper/extend",
    "bench memory": f"{TINY_BENCH} --rounds 1 --length 64",
    "bench generation": f"{TINY_BENCH} --rounds 2 --warmup 0 --prompt 40 --new 9",
    "bench long": f"{TINY_BENCH} --rounds 2 --warmup 0 --length 64 --window 16 --prefills 0",
    "bench": f"{TINY_BENCH} --rounds 2 --warmup 0 --length 64",
}
"""Options of a verb that a command does not give."""


class Block(NamedTuple):
    """A piece of a page that runs."""

    kind: str
    """python, yaml or command."""
    text: str
    line: int


_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^ {4}((?:metatokens|python|pip|make|torchrun|echo) .*)$", re.MULTILINE)


def blocks(text: str) -> Iterator[Block]:
    """Yield the blocks of a Markdown text in order."""
    found = [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in _FENCE.finditer(text)]
    outside = _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in _COMMAND.finditer(outside):
        command = re.sub(r"\s+#.*$", "", match[1]).strip()
        found.append(Block("command", command, text.count("\n", 0, match.start()) + 1))
    return iter(sorted((one for one in found if one.kind in ("python", "yaml", "command")), key=lambda one: one.line))


def reason_not_to_run(text: str) -> str:
    """Return why a command or a Python block does not run; empty if it does."""
    return next((reason for start, reason in NOT_RUN.items() if text.startswith(start)), "")


def smaller(command: str, folder: Path) -> list[str]:
    """Return the words of a `metatokens` command at a small size; presets that it needs are written to `folder`."""
    from metatokens.config.loading import preset_names

    words = shlex.split(command)
    for flag, number in SMALLER_NUMBERS.items():
        if flag in words:
            words[words.index(flag) + 1] = number
    verb = words[1]
    given = {word for word in words if word.startswith("--")}
    kind = " ".join(words[1:3])
    if verb == "analyze" and "--text" in words and kind not in FEW:
        kind = "analyze text"
    few = shlex.split(FEW.get(kind, FEW.get(verb, "")))
    for flag, number in zip(few[::2], few[1::2], strict=True):
        if flag not in given:
            words += [flag, number]
    if command.startswith(PLANNED):
        words.append("--dry-run")
    if verb == "info":
        return words
    for index, word in enumerate(words):
        if word in preset_names():
            kind = next(kind for kind in SMALLER if kind in word)
            path = folder / f"small-{word.replace('/', '-')}.yaml"
            path.write_text(f"extends: {word}\n{SMALLER[kind]}", encoding="utf-8")
            words[index] = path.name
    return words


def run(page: Path, folder: Path, provide: Callable[[Block], None] = lambda _: None) -> None:
    """Run a page in `folder`, which becomes the working directory.

    Args:
        page: a Markdown file.
        folder: where it runs.
        provide: gets each block before it runs, to put the files there that the page takes for granted.

    Raises:
        RuntimeError: a command fails; it names the page and the line. A Python block raises its own error.
    """
    text = page.read_text(encoding="utf-8")
    os.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    named = dict.fromkeys(re.findall(r"^ {4}metatokens .*?\s(\w+\.yaml)", text, re.MULTILINE))
    files = (block for block in blocks(text) if block.kind == "yaml")
    for name, block in zip(named, files, strict=False):  # a block that no command names shows a part of a file
        Path(name).write_text(block.text, encoding="utf-8")
    for block in blocks(text):
        where = f"{page.name}, line {block.line}"
        provide(block)
        if reason_not_to_run(block.text):
            continue
        if block.kind == "python":
            exec(compile(textwrap.dedent(block.text), where, "exec"), names)
        elif block.kind == "command":
            code = _run_command(block.text)
            if code:
                raise RuntimeError(f"{where}: exit code {code}: {block.text}")


def _run_command(command: str) -> int:
    """Run a command in this process if it is one of the package alone, else in a shell, and return its exit code."""
    from metatokens.cli import main

    if not command.startswith("metatokens "):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["bash", "-c", command], check=False, env={**os.environ, "PATH": path}).returncode
    return main(smaller(command, Path.cwd())[1:])


def main() -> int:
    """Run the pages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    for page in [path.absolute() for path in parser.parse_args().pages]:
        with tempfile.TemporaryDirectory() as folder:
            run(page, Path(folder))
            os.chdir(page.parent)
        print(f"{page.name}: every block runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
