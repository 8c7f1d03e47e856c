"""Every verb with its output and its exit code, through the entry point of the console command."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from commands import error_line, metatokens
from metatokens.cli import main
from metatokens.errors import UsageError

TINY = """
extends: tiny/meta
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}
data: {block_size: 64}
training: {duration: {kind: steps, steps: 6}, batch_blocks: 8, micro_batch_blocks: 8}
evaluation: {interval_steps: 3, blocks: 4}
checkpoint: {interval_steps: 3}
"""
SENTENCES = "The quick brown fox jumps over the lazy dog. A number such as {n}, and then {m}; nothing more!\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    books = folder / "books"
    books.mkdir()
    for book in range(12):
        text = "".join(SENTENCES.format(n=n * book, m=n + book) for n in range(40))
        (books / f"{book}.txt").write_text(text)
    (folder / "tiny.yaml").write_text(TINY)
    prepared = metatokens(
        *("prepare", books, "--out", folder / "tokens", "--vocab-size", "300", "--validation-fraction", "0.3", "--json")
    )
    assert json.loads(prepared.stdout)["vocab_size"] == 300
    trained = metatokens(
        *("pretrain", folder / "tiny.yaml", "--data.path", folder / "tokens", "--out", folder / "run", "--json")
    )
    assert json.loads(trained.stdout)["steps"] == 6
    return folder


def test_help_imports_no_torch():
    code = """
import sys, metatokens.cli as cli
try: cli.main(["--help"])
except SystemExit: pass
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "verb",
    [
        "demo",
        "prepare",
        "pretrain",
        "extend",
        "finetune",
        "evaluate",
        "sweep",
        "perplexity",
        "generate",
        "serve",
        "info",
    ],
)
def test_every_verb_explains_itself(verb):
    assert verb in metatokens(verb, "--help").stdout


def test_help_of_pretrain_lists_every_field_with_its_documentation():
    text = metatokens("pretrain", "--help").stdout
    assert "--injection.ratio [0.1]" in text
    assert "k: the share of a block's positions that are meta-tokens." in text


def test_dry_run_of_pretrain_says_what_would_happen_and_writes_nothing(work):
    done = metatokens(
        *("pretrain", work / "tiny.yaml", "--data.path", work / "tokens", "--out", work / "none", "--dry-run", "--json")
    )
    plan = json.loads(done.stdout)
    assert plan["steps"] == 6
    assert plan["text_tokens_per_step"] == 8 * 58
    assert not (work / "none").exists()


def test_pretrain_continued_after_its_end_is_already_complete(work):
    before = (work / "run/model/model.safetensors").stat().st_mtime_ns
    done = metatokens(
        *("pretrain", work / "tiny.yaml", "--data.path", work / "tokens", "--out", work / "run", "--json")
    )
    assert json.loads(done.stdout)["steps"] == 6
    assert "run ended at step 6" in done.stderr
    assert (work / "run/model/model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["run", "plain"])
def test_the_commands_that_follow_a_training_work_and_read_no_training_text(work, name):
    plain = ["--model.meta_attention_layers", "none", "--injection.kind", "none", "--data.block_size", "58"]
    arguments = ["--data.path", work / "tokens", "--out", work / name, *(plain if name == "plain" else [])]
    done, chain = metatokens("pretrain", work / "tiny.yaml", *arguments), []
    while len(chain) < 4 and (said := re.search("^next: metatokens (.*)$", done.stderr, re.MULTILINE)):
        chain.append(shlex.split(said[1]))
        done = metatokens(*chain[-1])
    assert [command[0] for command in chain] == (["generate"] * 2 if name == "run" else ["generate"]) + ["info"]


def test_a_runs_config_is_a_preset_that_equals_the_run(work):
    config = yaml.safe_load((work / "run/config.yaml").read_text())
    assert config["model"]["hidden_size"] == 32
    assert json.loads(metatokens("info", work / "run/config.yaml", "--json").stdout)["block_meta_tokens"] == 6


def score(work: Path) -> tuple[str | Path, ...]:
    """Return the command that scores the beginning of every book."""
    return ("perplexity", work / "run", work / "books", "--window", "50", "--max-tokens", "200")


def test_perplexity_scores_every_token_once_whatever_the_injection(work):
    kinds = ("none", "periodic", "uniform")
    results = [json.loads(metatokens(*score(work), "--injection", kind, "--json").stdout) for kind in kinds]
    assert len({result["text_tokens"] for result in results}) == 1
    assert all(result["non_overlapping"]["perplexity"]["low"] is not None for result in results)
    assert len({result["non_overlapping"]["nats"] for result in results}) == 3


def test_perplexity_under_interventions_records_them(work):
    base = (*score(work), "--injection", "periodic", "--json")
    chosen = ("--intervention", "token_embedding=7", "--intervention", "no_position_edges")
    plain, changed = (json.loads(metatokens(*base, *more).stdout) for more in ((), chosen))
    assert plain["interventions"] == []
    assert changed["interventions"] == [{"kind": "token_embedding", "token_id": 7}, {"kind": "no_position_edges"}]
    assert changed["non_overlapping"]["nats"] != plain["non_overlapping"]["nats"]
    assert json.loads(metatokens(*base, *chosen, "--dry-run").stdout)["interventions"] == list(chosen[1::2])


@pytest.mark.filterwarnings("default:interventions act")  # as outside of pytest, where a warning is no error
def test_an_intervention_without_meta_tokens_is_warned_of(work):
    done = metatokens(*score(work), "--intervention", "zero_embedding")
    assert "warning: interventions act at meta-tokens" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        (("zero_embeding",), "did you mean 'zero_embedding'"),
        (("token_embedding=300",), "id 300"),
        (("zero_embedding", "mean_embedding"), "at most one that changes the embedding"),
        (("no_meta_attention=5",), "[5]"),
    ],
)
def test_an_intervention_that_cannot_be_is_refused_before_any_work(work, chosen, named):
    flags = [argument for kind in chosen for argument in ("--intervention", kind)]
    assert named in error_line("perplexity", work / "run", work / "books", *flags, "--dry-run", code=2)


def test_generate_hides_meta_tokens_unless_asked_to_show_them(work):
    command = ("generate", work / "run", "The quick", "--max-text-tokens", "20", "--every", "5")
    assert "_PAUSE_" not in metatokens(*command).stdout
    assert "_PAUSE_" in metatokens(*command, "--show-meta").stdout


def test_generate_repeats_itself_with_the_same_seed(work):
    command = ("generate", work / "run", "The quick", "--max-text-tokens", "20", "--seed")
    assert metatokens(*command, "3").stdout == metatokens(*command, "3").stdout


def test_a_prompt_is_read_from_standard_input(work, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A number"))
    assert metatokens("generate", work / "run", "--max-text-tokens", "4").stdout.startswith("A number")


def test_the_console_command_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "metatokens.cli", "prepare", tmp_path / "missing.txt", "--out", tmp_path / "none"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 3


def test_info_gives_the_papers_sizes():
    sizes = {
        "paper/gpt2-124m": 124_439_808,
        "paper/meta-learned-152m": 152_788_224,
        "paper/meta-rope-152m": 152_001_792,
        "paper/gpt2-16-layers": 152_791_296,
    }
    for preset, size in sizes.items():
        result = json.loads(metatokens("info", preset, "--json").stdout)
        assert result["parameters_at_text_vocabulary"] == size
        assert preset != "paper/meta-rope-152m" or result["differs_from_the_paper"] == []


def test_info_of_a_run_its_model_and_its_checkpoints_knows_the_meta_tokens_of_its_blocks(work, tmp_path):
    of_preset = json.loads(metatokens("info", work / "run/config.yaml", "--text-vocab-size", "300", "--json").stdout)
    assert (of_preset["block_positions"], of_preset["block_meta_tokens"]) == (64, 6)
    for place in ("run", "run/model", "run/checkpoints/step-00000003"):
        assert json.loads(metatokens("info", work / place, "--json").stdout) == of_preset
    alone = json.loads(metatokens("info", shutil.copytree(work / "run/model", tmp_path / "model"), "--json").stdout)
    assert "differs_from_the_paper" not in alone


def test_the_model_of_a_run_has_a_card_and_the_schedule_of_its_injection(work):
    card = (work / "run/model/README.md").read_text()
    assert "`metatokens pretrain` made it" in card
    assert "| steps | 6 |" in card
    schedule = json.loads((work / "run/model/generation_config.json").read_text())["meta_schedule"]
    assert schedule == {"kind": "uniform", "ratio": 0.1, "seed": 0}


def test_info_knows_presets_of_fine_tuning():
    result = json.loads(metatokens("info", "tiny/recall", "--text-vocab-size", "300", "--json").stdout)
    assert result["parameters_of_meta_attention"] == 4 * (4 * 128 * 128 + 4 * 128)
    assert "starts from" in error_line("info", "paper/recall", code=2)


def test_info_of_a_checkpoint_counts_its_parameters(work):
    from safetensors.torch import load_file

    stored = sum(tensor.numel() for tensor in load_file(work / "run/model/model.safetensors").values())
    assert json.loads(metatokens("info", work / "run", "--json").stdout)["parameters"] == stored


def test_a_dry_run_refuses_what_the_run_itself_would_refuse_and_writes_nothing(work, tmp_path):
    (tmp_path / "file").write_text("in the way")
    prepare = ("prepare", work / "books")
    score = ("perplexity", work / "run", work / "books")
    train = ("pretrain", work / "tiny.yaml", "--data.path", work / "tokens", "--out")
    other = shutil.copytree(work / "run", tmp_path / "other")
    (other / "config.yaml").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "odd" / "model").mkdir(parents=True)
    (tmp_path / "sweep.yaml").write_text("preset: tiny/recall\n")
    extend = ("extend", work / "run", "--factor", "2", "--preset", "tiny/extend")
    commands = (
        ((*prepare, "--out", work / "tokens"), 2, "a prepared dataset"),
        ((*prepare, "--out", tmp_path / "new", "--tokenizer", tmp_path / "no-tokenizer"), 2, "no-tokenizer"),
        ((*prepare, "--out", tmp_path / "file/new"), 2, "can be made and written"),
        ((*score, "--window", "100"), 2, "at most 64 positions"),
        ((*score, "--window", "20", "--stride", "30"), 2, "at most the 20 text tokens"),
        ((*train, work / "run", "--seed", "1"), 2, "seed: expected 0 as in its config.yaml"),
        ((*train, tmp_path / "file"), 2, "can be written"),
        ((*train, tmp_path / "file/run"), 2, "can be written"),
        ((*train, tmp_path / "new", "--training.batch_blocks", "80000"), 2, "at least one batch of 80000 blocks"),
        ((*train, tmp_path / "new", "--model.hidden_act", "geluu"), 2, "did you mean 'gelu'"),
        ((*train, other, "--seed", "1"), 4, "a checkpoint of this config"),
        ((*train, tmp_path / "link"), 2, "No such file or directory"),
        ((*train, tmp_path / ("x" * 256)), 2, "File name too long"),
        ((*train, tmp_path / "odd"), 2, "no model before the end of the run"),
        ((*extend, "--out", tmp_path / "link", "--no-training"), 2, "a new folder"),
        ((*extend, "--out", tmp_path / "file/new", "--no-training"), 2, "Not a directory"),
        (("demo", "--out", tmp_path / "file"), 2, "Not a directory"),
        (("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "file"), 2, "Not a directory"),
    )

    def everything() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for folder in (work, tmp_path) for path in folder.rglob("*")}

    before = everything()
    lines = [error_line(*command, "--dry-run", code=code) for command, code, _ in commands]
    for command in ((*prepare, "--out", tmp_path / "new"), score, (*train, work / "run"), (*train, tmp_path / "new")):
        metatokens(*command, "--dry-run")
    assert everything() == before
    for line, (command, code, named) in zip(lines, commands, strict=True):
        assert named in line
        assert error_line(*command, code=code) == line


def test_an_override_may_stand_before_the_preset_and_a_misspelt_flag_is_no_override(work, tmp_path):
    arguments = (work / "tiny.yaml", "--dry-run", "--out", tmp_path / "new")
    before = metatokens("pretrain", "--data.path", work / "tokens", "--optimizer.learning_rate", "1.5e3", *arguments)
    after = metatokens("pretrain", *arguments, "--data.path", work / "tokens", "--optimizer.learning_rate=1500")
    assert before.stdout == after.stdout
    assert "did you mean '--dry-run'?" in error_line("pretrain", "--dryrun", work / "tiny.yaml", code=2)


def test_a_home_folder_is_found_where_the_shell_leaves_it_as_it_is(work, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tokens").symlink_to(work / "tokens")
    planned = metatokens("pretrain", work / "tiny.yaml", "--data.path=~/tokens", "--out=~/new", "--dry-run", "--json")
    assert json.loads(planned.stdout)["out"] == str(tmp_path / "new")
    assert "no-such-user" in error_line("pretrain", work / "tiny.yaml", "--out=~no-such-user/x", code=2)


def test_presets_of_one_name_have_run_folders_of_their_own(work):
    def planned(preset):
        done = metatokens("pretrain", preset, "--data.path", work / "tokens", "--dry-run", "--json")
        return json.loads(done.stdout)["out"]

    assert planned(work / "tiny.yaml") == "runs/tiny"
    assert planned("tiny/plain") == "runs/tiny/plain"


# Bad input ---------------------------------------------------------------------------------------------------


def test_an_unknown_verb_is_one_line():
    assert "did you mean 'pretrain'?" in error_line("pretrian", code=2)


def test_an_unknown_preset_comes_with_a_suggestion():
    assert "did you mean 'tiny/meta'?" in error_line("pretrain", "tiny/mta", code=2)


def test_a_misspelt_key_comes_with_a_suggestion():
    line = error_line("pretrain", "tiny/meta", "--model.hiden_size", "64", code=2)
    assert "did you mean 'model.hidden_size'?" in line


@pytest.mark.parametrize("ratio", ["1.0", "-0.1", "nan", "0.999"])
def test_a_ratio_that_leaves_no_text_or_none_at_all_is_refused(ratio):
    assert "ratio" in error_line("pretrain", "tiny/meta", "--injection.ratio", ratio, code=2)


@pytest.mark.parametrize(
    "command",
    [
        *(("generate", flag) for flag in ("--ratio=1.5", "--ratio=nan", "--every=0", "--seed=-1", "--top-k=0")),
        *(("generate", flag) for flag in ("--max-text-tokens=0", "--temperature=-1", "--top-p=0", f"--seed={2**63}")),
        *(("perplexity", flag) for flag in ("--window=0", "--window=-5", "--stride=0", "--batch-size=0")),
        *(("perplexity", flag) for flag in ("--max-tokens=0", "--seed=-1", "--ratio=1", "--max-documents=0")),
        *(("prepare", flag) for flag in ("--max-documents=0", "--vocab-size=5", "--shard-tokens=0")),
        *(("prepare", flag) for flag in ("--validation-fraction=1.5", "--max-documents=x")),
        ("demo", "--text-tokens=0"),
    ],
    ids=" ".join,
)
def test_a_number_out_of_range_is_one_line_that_names_its_flag(work, tmp_path, command):
    verb, flag = command
    places = {
        "generate": (work / "run", "text", "--json"),
        "perplexity": (work / "run", work / "books"),
        "prepare": (work / "books", "--out", tmp_path / "out"),
        "demo": ("--out", tmp_path / "out"),
    }
    line = error_line(verb, *places[verb], flag, code=2)
    assert flag.partition("=")[0].removeprefix("--").replace("-", "") in line.replace("-", "").replace("_", "")
    assert not (tmp_path / "out").exists()


def test_a_schedule_is_built_of_its_own_numbers_only(work):
    done = metatokens("generate", work / "run", "The", "--max-text-tokens", "9", "--schedule", "none", "--json")
    assert json.loads(done.stdout)["meta_tokens"] == 0


def test_a_missing_file_is_a_data_error(tmp_path):
    for more in ((), ("--dry-run",)):
        line = error_line("prepare", tmp_path / "missing.txt", "--out", tmp_path / "out", *more, code=3)
        assert "missing.txt: " in line
        assert "no such file" in line
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_a_data_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    error_line("prepare", tmp_path / "empty.txt", "--out", tmp_path / "out", code=3)
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_utf8_is_a_data_error_with_its_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    assert "5" in error_line("prepare", tmp_path / "bad.txt", "--out", tmp_path / "out", code=3)


def test_a_corpus_shorter_than_one_block_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    metatokens(
        "prepare",
        tmp_path / "short.txt",
        "--out",
        tmp_path / "tokens",
        "--vocab-size",
        "300",
        "--validation-fraction",
        "0",
    )
    line = error_line("pretrain", "tiny/meta", "--data.path", tmp_path / "tokens", "--out", tmp_path / "run", code=2)
    assert "tokens" in line


def test_an_altered_shard_is_a_data_error_that_names_it(work, tmp_path):
    shutil.copytree(work / "tokens", tmp_path / "tokens")
    shard = tmp_path / "tokens/train-00000.ds"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    line = error_line(
        "pretrain", work / "tiny.yaml", "--data.path", tmp_path / "tokens", "--out", tmp_path / "r", code=3
    )
    assert "train-00000.ds" in line
    shard.write_bytes(content[:-2])
    line = error_line(
        "pretrain", work / "tiny.yaml", "--data.path", tmp_path / "tokens", "--out", tmp_path / "r", code=3
    )
    assert "train-00000.ds" in line


def test_a_tokenizer_that_does_not_match_the_shards_is_a_data_error(work, tmp_path):
    shutil.copytree(work / "tokens", tmp_path / "tokens")
    tokenizer = tmp_path / "tokens/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("true", "false", 1))
    line = error_line(
        "pretrain", work / "tiny.yaml", "--data.path", tmp_path / "tokens", "--out", tmp_path / "r", code=3
    )
    assert "tokenizer.json" in line


def test_a_model_beyond_the_memory_is_a_resource_error_with_advice(work):
    size = ("--model.hidden_size", str(2**42), "--model.num_attention_heads", "2")
    done = metatokens("pretrain", "tiny/meta", "--data.path", work / "tokens", "--out", work / "huge", *size, code=6)
    assert re.search(
        r"at the peak \d+\.\d GiB were held; lower training.micro_batch_blocks", done.stderr.splitlines()[-1]
    )


def test_a_block_longer_than_the_model_is_refused(work):
    line = error_line("pretrain", work / "tiny.yaml", "--data.block_size", "128", code=2)
    assert "128" in line
    assert "64" in line


def test_a_window_longer_than_the_model_is_refused(work):
    line = error_line("perplexity", work / "run", work / "books", "--window", "100", code=2)
    assert "100" in line
    assert "64" in line


def test_a_prompt_longer_than_the_model_is_refused(work):
    for more in ((), ("--json",)):
        assert "64" in error_line("generate", work / "run", "word " * 200, *more, code=2)


def test_a_folder_that_is_no_checkpoint_is_a_checkpoint_error(tmp_path):
    error_line("generate", tmp_path, "text", code=4)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("folder", ["model", "checkpoints/step-00000003"])
def test_a_flipped_bit_in_a_model_or_a_checkpoint_is_a_checkpoint_error_that_names_the_file(
    work, tmp_path, folder, file
):
    shutil.copytree(work / "run", tmp_path / "run")
    damaged = tmp_path / "run" / folder / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    where = tmp_path / "run" if folder == "model" else tmp_path / "run" / folder
    for command in (("generate", where, "text", "--json"), ("perplexity", where, work / "books"), ("info", where)):
        assert f"{folder}/{file}: expected SHA-256" in error_line(*command, code=4)


def test_a_checkpoint_whose_weights_do_not_fit_its_config_is_a_checkpoint_error(work, tmp_path):
    shutil.copytree(work / "run/model", tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 32}))
    error_line("generate", tmp_path / "model", "text", "--json", code=4)


def test_a_damaged_weights_file_is_a_checkpoint_error(work, tmp_path):
    shutil.copytree(work / "run/model", tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error_line("generate", tmp_path / "model", "text", "--json", code=4)


def test_an_output_folder_that_cannot_be_written_is_refused(work, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    error_line("pretrain", work / "tiny.yaml", "--data.path", work / "tokens", "--out", out, code=2)
    error_line("prepare", work / "books", "--out", out, "--vocab-size", "300", code=2)


def test_debug_raises_the_error_with_its_traceback():
    with pytest.raises(UsageError):
        main(["pretrain", "tiny/mta", "--debug"])
