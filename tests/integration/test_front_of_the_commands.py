"""What a command says before its work: an error before torch is imported, the name that was meant, help, completion."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from commands import error_line, metatokens
from metatokens.analysis.results import write_results
from metatokens.cli import VERBS
from metatokens.cli.arguments import INTERVENTIONS, _as_declared
from metatokens.cli.output import announce
from metatokens.config.loading import preset_names
from metatokens.evaluation.interventions import KINDS
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from synthetic_results import build_results

MISSING = "no/such/place.yaml"
# a wrong path for every verb, or for what a verb must know beside it
WRONG_PATHS = {
    "demo": ["--out", f"{__file__}/demo"],
    "prepare": [MISSING, "--out", "tokens"],
    "adopt": [MISSING, "--out", "tokens"],
    "pretrain": ["tiny/meta", "--data.path", MISSING],
    "extend": [MISSING, "--out", "longer"],
    "finetune": ["tiny/recall", "--start.kind", "checkpoint", "--start.path", MISSING],
    "graft": [MISSING, "--data.path", MISSING],
    "evaluate": [MISSING],
    "sweep": [MISSING, "--out", "grid"],
    "replicate": ["--scale", MISSING, "--out", "replication"],
    "perplexity": [MISSING, "text.txt"],
    "analyze": [MISSING, "--out", "analysis"],
    "report": [MISSING],
    "generate": [MISSING, "Once"],
    "compress": [MISSING, "text.txt", "--out", "text.safetensors"],
    "serve": [MISSING],
    "export": [MISSING, "--out", "exported"],
    "verify": [MISSING],
    "info": [MISSING],
    "plan": [MISSING],
    "bench": ["training", "--out", f"{__file__}/bench.json"],
}
OTHER_MISTAKES = (
    ["pretrain", "tiny/mta"],
    ["pretrain", "tiny/meta"],
    ["pretrain", "tiny/meta", "--stpes", "3"],
    ["bench", "trainign"],
    ["bench", "training", "--lenght", "64"],
    ["finetune", "tiny/recal"],
    ["extend", MISSING, "--preset", "tiny/extnd", "--out", "longer"],
    ["evaluate", MISSING, "--intervention", "zero_embeding"],
    ["evaluate", MISSING, "--suite", "long-context"],
)


def test_every_verb_has_a_wrong_path_here() -> None:
    assert WRONG_PATHS.keys() == {verb.__name__.rpartition(".")[2] for verb in VERBS}


def test_no_verb_imports_torch_before_it_refuses_a_wrong_path_or_option(tmp_path: Path) -> None:
    commands = [[verb, *arguments] for verb, arguments in WRONG_PATHS.items()]
    commands += OTHER_MISTAKES
    # one process for all: the first that imports torch is named by the first line of the output
    script = (
        "import json, sys\n"
        "from metatokens.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    code = main(command)\n"
        "    print(command, code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(commands)
    assert [line for line in lines if line.endswith("True") or " 0 " in line] == []
    assert len(done.stderr.splitlines()) == len(commands), done.stderr


FIRST_WORDS = """
import io, json, os, sys, time
from importlib.machinery import ModuleSpec
from metatokens.cli import main

class Heavy(BaseException):
    pass

class Loader:
    def create_module(self, spec):
        raise Heavy

    exec_module = create_module

class Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, Loader()) if name in ("torch", "transformers", "matplotlib") else None

sys.meta_path.insert(0, Finder())
for name, command in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    console, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    try:
        code = main(command)
    except Heavy:
        code = None
    said = sys.stderr.getvalue() + sys.stdout.getvalue()
    print(json.dumps([name, time.process_time(), code, said]), file=console, flush=True)
    os._exit(0)
"""


def test_every_verb_says_what_it_does_before_its_slow_imports(tmp_path: Path, tokens: Path) -> None:
    model = MetaTokenForCausalLM(
        MetaTokenConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.save_pretrained(tmp_path / "model")
    write_results(tmp_path / "analysis", *build_results())
    (tmp_path / "text.txt").write_text("The owl sat, and the owl saw a mouse.")
    (tmp_path / "sweep.yaml").write_text("preset: tiny/recall\naxes: {arm: {a: {}}}\n")
    commands = {
        "demo": ["--out", "demo"],
        "prepare": ["text.txt", "--out", "prepared"],
        "adopt": ["text.txt", "--out", "adopted"],
        "pretrain": ["tiny/meta", "--data.path", str(tokens)],
        "extend": ["model", "--out", "longer"],
        "finetune": ["tiny/recall", "--out", "recall"],
        "graft": ["model", "--data.path", str(tokens)],
        "evaluate": ["model", "--task.kind", "parity"],
        "sweep": ["sweep.yaml", "--out", "grid"],
        "replicate": ["--out", "replication"],
        "perplexity": ["model", "text.txt"],
        "analyze": ["model", "--text", "text.txt", "--out", "looked"],
        "report": ["analysis"],
        "generate": ["model", "Once"],
        "serve": ["model"],
        "export": ["model", "--out", "exported"],
        "compress": ["model", "text.txt", "--out", "memory"],
        "bench": ["generation"],
        "verify": ["analysis"],
        "info": ["model"],
        "plan": ["tiny/meta"],
    }
    assert commands.keys() == WRONG_PATHS.keys(), "a new verb says what it does, too"
    given = json.dumps({verb: [verb, *arguments] for verb, arguments in commands.items()})
    done = subprocess.run(
        [sys.executable, "-c", FIRST_WORDS, given], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(commands)
    refused = {name for name, _, code, _ in found if code not in (None, 0)}
    assert refused <= {"adopt"}, found  # its text is no folder of tokens
    assert [name for name, _, _, said in found if not said.strip()] == []
    assert max(seconds for _, seconds, _, _ in found) < 2, "CPU seconds to the first words"


def test_help_and_version_load_neither_rich_nor_numpy_nor_pydantic() -> None:
    script = (
        "import sys\n"
        "from metatokens.cli import main\n"
        "try:\n"
        "    main([])\n"
        "finally:\n"
        "    print({'torch', 'numpy', 'rich', 'pydantic'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_command_without_a_verb_shows_the_help() -> None:
    assert metatokens().stdout == metatokens("--help").stdout


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["evalute", "run"], "evaluate"),
        (["info", "--preset"], "--presets"),
        (["generate", "run", "--topk", "3"], "--top-k"),
        (["generate", "run", "--schedule", "peridic"], "periodic"),
        (["pretrain", "tiny/mta"], "tiny/meta"),
        (["perplexity", "run", "text", "--intervention", "zero_embeding"], "zero_embedding"),
        (["--print-completion", "bsh"], "bash"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_one(command: list[str], meant: str) -> None:
    assert f"did you mean {meant!r}?" in error_line(*command, code=2)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", MISSING, "Once", "--show_meta", "--max_text_tokens=3"],
        ["perplexity", MISSING, "text.txt", "--dry_run"],
        ["evaluate", MISSING, "--batch-size", "4", "--dry_run"],  # a field, and a flag among fields
        ["analyze", MISSING, "--out", "analysis", "--view-tokens=64", "--dry_run"],
    ],
)
def test_options_may_be_written_with_either_dash(command: list[str]) -> None:
    assert MISSING in error_line(*command, code=4)


def test_what_stands_behind_two_dashes_stays_as_it_is() -> None:
    assert _as_declared(["--show_meta", "--", "--show_meta"], ["--show-meta"]) == ["--show-meta", "--", "--show_meta"]


@pytest.mark.parametrize(
    ("verb", "preset", "other"), [("pretrain", "tiny/recall", "finetune"), ("finetune", "tiny/meta", "pretrain")]
)
def test_a_preset_of_the_other_kind_of_run_is_sent_there(verb: str, preset: str, other: str) -> None:
    assert f"write `metatokens {other} {preset}`" in error_line(verb, preset, code=2)


@pytest.mark.parametrize("verb", [verb.__name__.rpartition(".")[2] for verb in VERBS])
def test_help_fits_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = metatokens(verb, "-h").stdout.splitlines()
    assert [line for line in shown if len(line) > 80] == []


def test_the_interventions_of_the_command_line_are_those_of_the_evaluation() -> None:
    assert INTERVENTIONS.keys() == set(KINDS)


@pytest.fixture(scope="module")
def presets() -> list[dict[str, Any]]:
    return json.loads(metatokens("info", "--presets", "--json").stdout)["presets"]


def test_the_list_of_presets_fits_80_columns_and_says_what_each_is_for(presets: list[dict[str, Any]]) -> None:
    shown = metatokens("info", "--presets").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "The plain twin of tiny/meta" in shown
    assert [preset["name"] for preset in presets] == preset_names()
    assert all(preset["purpose"] for preset in presets)


def test_the_size_of_a_preset_is_that_which_info_says_of_it(presets: list[dict[str, Any]]) -> None:
    listed = {preset["name"]: preset["parameters"] for preset in presets}
    for name in ("tiny/meta", "tiny/recall"):
        assert json.loads(metatokens("info", name, "--json").stdout)["parameters"] == listed[name]


def test_bash_completes_verbs_flags_and_presets(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.sh"
    script.write_text(metatokens("--print-completion", "bash").stdout)

    def complete(*words: str) -> list[str]:
        ask = f"source {script}; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
        function = "$(complete -p metatokens | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
        ask += f'{function} metatokens "${{COMP_WORDS[COMP_CWORD]}}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
        return subprocess.run(["bash", "-c", ask], text=True, capture_output=True, check=True).stdout.split()

    assert complete("metatokens", "perp") == ["perplexity"]
    assert complete("metatokens", "generate", "--sch") == ["--schedule"]
    assert complete("metatokens", "pretrain", "tiny/meta") == ["tiny/meta", "tiny/meta-learned"]


def test_slow_imports_are_announced_and_those_already_made_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(Namespace(json=False), "opening run")
    assert capsys.readouterr().err == ""
    monkeypatch.delitem(sys.modules, "torch")
    announce(Namespace(json=False), "opening run")
    announce(Namespace(json=True), "opening run")
    assert capsys.readouterr().err == "opening run ...\n"
