"""A model of another package through the path of our own: fine-tuned, resumed, asked, scored and reopened."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from training_runs import losses, run, start, wait, wait_for_step, weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from commands import error_line, metatokens
from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset
from metatokens.config.sweep import load_sweep
from metatokens.data.special_tokens import META_TOKEN
from metatokens.data.tokenizer import load_text_tokenizer, text_vocab_size
from metatokens.errors import DataError
from metatokens.evaluation.perplexity import measure_perplexity
from metatokens.evaluation.windows import PerplexityOptions
from metatokens.sweep.planning import plan_sweep
from metatokens.training.finetuning import build_on_meta_device, finetune, training_batches, word_tokenizer
from metatokens.training.loading import ModelFolder, open_model
from metatokens.training.run_folder import RunFolder
from metatokens.training.setup import count_batch_flops
from tiny_models import randomize

PRESET = """
extends: tiny/recall
start: {{kind: checkpoint, path: {path}}}
task: {{kind: parity}}
curriculum:
  - {{steps: 6, size: [3, 4], prompt_tokens: [1, 24]}}
  - {{steps: 6, size: [3, 6], prompt_tokens: [1, 32]}}
schedule: {{warmup_steps: 2}}
training: {{batch_blocks: 8, micro_batch_blocks: 4, device: cpu}}
evaluation: {{interval_steps: 6, instances: 10}}
checkpoint: {{interval_steps: 2, keep: 100}}
logging: {{interval_steps: 1}}
"""
POSITIONS = 64
Config = Callable[..., FinetuneConfig]


def save_as_from_the_hub(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model of random weights with a tokenizer that has neither meta-token nor padding."""
    randomize(model).save_pretrained(folder)
    tokenizer = word_tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vocab_size() -> int:
    return text_vocab_size(word_tokenizer())


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory, vocab_size: int) -> Path:
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_as_from_the_hub(GPTNeoForCausalLM(config), tmp_path_factory.mktemp("hub") / "neo")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, vocab_size: int) -> Path:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert config.resid_pdrop > 0  # dropout as it came
    return save_as_from_the_hub(GPT2LMHeadModel(config), tmp_path_factory.mktemp("hub") / "gpt2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("preset")

    def config(path: Path, *overrides: str) -> FinetuneConfig:
        (folder / "small.yaml").write_text(PRESET.format(path=path))
        return load_preset(folder / "small.yaml", overrides, schema=FinetuneConfig)

    return config


@pytest.fixture(scope="module")
def done(config: Config, neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "run"
    finetune(config(neo), out, show_progress=False)
    return out


@torch.no_grad()
def test_a_run_starts_from_the_model_as_it_came_and_trains_it(neo: Path, done: Path, vocab_size: int):
    original = AutoModelForCausalLM.from_pretrained(neo).double().eval()
    start, trained = open_model(neo).double(), open_model(done).double()
    ids = torch.arange(1, 30)[None]
    torch.testing.assert_close(start(ids).logits[..., :vocab_size], original(ids).logits)
    assert (trained(ids).logits - start(ids).logits).abs().max() > 1e-3
    result = json.loads((done / "result.json").read_text())
    assert result["meta_tokens"] > 0
    row = trained.get_output_embeddings().weight[vocab_size]
    assert not torch.equal(row, start.get_output_embeddings().weight[vocab_size])  # the meta-token has learned


def test_the_card_of_a_model_of_another_package_says_what_it_is(neo: Path, done: Path):
    card = (done / "model" / "README.md").read_text()
    assert f"| started from | {neo.name} |" in card
    assert "GPTNeoForCausalLM" in card
    assert "ordinary model of transformers" in card
    assert "states no schedule" in card


def test_the_operations_of_a_run_are_those_of_its_batches(config: Config, neo: Path, done: Path):
    model, tokenizer = build_on_meta_device(config(neo))
    assert model.device.type == "meta"
    batches = training_batches(config(neo), model, tokenizer)
    flops = sum(count_batch_flops(model, batches.batch_at(step)) for step in range(12))
    result = json.loads((done / "result.json").read_text())
    assert result["training_flops"] == flops > 0
    assert model.num_parameters() == result["num_parameters"] == open_model(done).num_parameters()


@pytest.mark.parametrize("arm", ["neo", "gpt2"])
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_was_left_alone(
    config: Config, arm: str, tmp_path: Path, request: pytest.FixtureRequest
):
    path = request.getfixturevalue(arm)
    assert run(config(path), tmp_path / "whole") == [0]
    started = start(config(path), tmp_path / "run")
    wait_for_step(tmp_path / "run", 7, started)
    started[0].kill()
    assert wait(started) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "model").exists()
    assert run(config(path), tmp_path / "run") == [0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def cut_off(reference: Path, out: Path) -> Path:
    """Make the folder of a run that was killed some time after its checkpoint of step 10."""
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    assert (out / "checkpoints" / "step-00000010").is_dir()
    return out


def test_a_run_goes_on_from_the_same_weights_at_another_place(config: Config, neo: Path, done: Path, tmp_path: Path):
    shutil.copytree(neo, tmp_path / "copy")
    out = cut_off(done, tmp_path / "run")
    finetune(config(tmp_path / "copy"), out, show_progress=False)
    assert weights(out) == weights(done)
    # a sweep that starts elsewhere has not this run
    assert RunFolder(out).is_finished(config(tmp_path / "copy"))
    assert not RunFolder(out).is_finished(config(neo))


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_a_run_goes_on_from_no_other_weights_at_the_same_place(
    config: Config, neo: Path, done: Path, tmp_path: Path, changed: str
):
    there = tmp_path / "there"
    shutil.copytree(neo, there)
    out = cut_off(done, tmp_path / "run")
    if changed == "config.json":
        shape = json.loads((there / changed).read_text())
        (there / changed).write_text(json.dumps({**shape, "window_size": 9}))
    else:
        randomize(GPTNeoForCausalLM.from_pretrained(there), seed=1).save_pretrained(there)
    with pytest.raises(DataError, match="expected the data and weights that the run began with"):
        finetune(config(there), out, show_progress=False)
    assert not (out / "model").exists()
    # another version of transformers writes its own name alone
    shutil.rmtree(there)
    shutil.copytree(neo, there)
    shape = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**shape, "transformers_version": "0"}))
    finetune(config(there), out, show_progress=False)
    assert weights(out) == weights(done)


@torch.no_grad()
def test_what_a_run_leaves_opens_with_transformers_alone_and_here(done: Path, vocab_size: int):
    plain = AutoModelForCausalLM.from_pretrained(done / "model").eval()
    assert type(plain) is GPTNeoForCausalLM
    ids = torch.tensor([[5, 6, vocab_size, 7, 8]])
    for folder in (done, done / "model", done / "checkpoints" / "step-00000012"):
        model = open_model(folder)
        assert isinstance(model, PretrainedCausalLM)
        assert not model.training
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(done / "model").convert_tokens_to_ids(META_TOKEN) == vocab_size
    assert text_vocab_size(ModelFolder(done).tokenizer) == vocab_size == plain.config.meta_token_id


def test_the_commands_evaluate_it_and_a_length_past_its_table_reads_na(done: Path, neo: Path):
    lengths = ["--lengths", "[17-24, 101-120]", "--instances", "8", "--extrapolate", "true"]
    report = json.loads(metatokens("evaluate", done, *lengths, "--json").stdout)
    assert report["config"]["task"]["kind"] == "parity"
    assert [row["sequence_accuracy"] is None for row in report["rows"]] == [False, True]
    untrained = json.loads(metatokens("evaluate", neo, "--task.kind", "parity", *lengths, "--json").stdout)
    assert untrained["parameters"] == report["parameters"]


def test_an_intervention_in_our_own_model_is_refused_in_one_line(done: Path):
    line = error_line("evaluate", done, "--intervention", "zero_position", code=2)
    assert "intervention zero_position: expected a model of this package" in line
    assert "GPTNeoForCausalLM" in line


def test_the_commands_score_it_in_its_whole_window_with_pause_tokens(done: Path, tmp_path: Path):
    text = "The cube is in the salon, and the suit is in the hermit's box. " * 6
    (tmp_path / "text.txt").write_text(text)
    scored = json.loads(metatokens("perplexity", done, tmp_path / "text.txt", "--json").stdout)
    assert scored["positions_per_window"] == POSITIONS
    plain = AutoModelForCausalLM.from_pretrained(done / "model")
    options = PerplexityOptions(window=POSITIONS)
    expected = measure_perplexity(plain, [("text", text)], load_text_tokenizer(str(done / "model")), options)
    assert scored["non_overlapping"]["nats"] == pytest.approx(expected.non_overlapping.nats, rel=1e-5)
    paused = json.loads(
        metatokens("perplexity", done, tmp_path / "text.txt", "--injection", "uniform", "--json").stdout
    )
    assert paused["text_tokens"] == scored["text_tokens"]
    assert paused["non_overlapping"]["nats"] != scored["non_overlapping"]["nats"]
    generated = metatokens("generate", done, "The cube", "--max-text-tokens", "4", "--every", "3", "--json")
    assert json.loads(generated.stdout)["text_tokens"] <= 4
    assert json.loads(metatokens("info", done, "--json").stdout)["block_positions"] == POSITIONS


def test_a_sweep_matches_the_budget_of_one_to_that_of_ours(neo: Path, tmp_path: Path):
    (tmp_path / "base.yaml").write_text(PRESET.format(path=neo))
    model = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}"
    (tmp_path / "sweep.yaml").write_text(
        f"preset: base.yaml\naxes: {{arm: {{neo: , ours: {{start: {{kind: fresh, model: {model}}}}}}}}}\n"
        "seeds: [0]\nreference: neo\nmatch: flops\ntolerance: 0.1\n"
        "evaluations: [{name: asked, ask: {lengths: [17-32]}}]\n"
    )
    runs = plan_sweep(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out", "sweep.yaml")
    theirs, ours = runs
    assert theirs.parameters == open_model(neo).num_parameters() < ours.parameters  # no meta-attention
    assert ours.budget.training_flops == pytest.approx(theirs.budget.training_flops, rel=0.1)
    assert ours.budget.flops_of_stages[0] > theirs.budget.flops_of_stages[0]


def test_a_stage_longer_than_its_table_is_refused_before_anything_is_trained(neo: Path, tmp_path: Path):
    curriculum = "[{steps: 12, size: [3, 3], prompt_tokens: [1, 65]}]"
    (tmp_path / "small.yaml").write_text(PRESET.format(path=neo))
    line = error_line("finetune", tmp_path / "small.yaml", "--curriculum", curriculum, "--dry-run", code=2)
    assert "at most the 64 positions" in line


def test_weights_that_are_pickled_or_missing_are_refused_in_one_line(neo: Path, tmp_path: Path):
    folder = tmp_path / "neo"
    shutil.copytree(neo, folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in error_line("evaluate", folder, "--task.kind", "parity", code=4)


def test_a_model_of_another_kind_is_no_start_of_a_pretraining_or_an_extension(neo: Path, tmp_path: Path):
    line = error_line("extend", neo, "--out", tmp_path / "out", code=4)
    assert "expected a model of this package" in line


def test_a_folder_that_is_spelt_wrong_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "a folder with config.json" in error_line("evaluate", "runs/meta", code=4)


def test_an_id_of_the_hub_opens_from_its_cache(neo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # of HF_HOME, which is read on import
    repository = tmp_path / "models--owner--tiny-neo"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(neo, repository / "snapshots" / revision)
    questions = ["--task.kind", "parity", "--lengths", "[17-24]", "--instances", "4"]
    asked = metatokens("evaluate", "owner/tiny-neo", *questions, "--json")
    assert json.loads(asked.stdout)["models"] == ["owner/tiny-neo"]
    line = error_line("evaluate", "owner/other", *questions, code=4)
    assert "on the Hugging Face hub or in its cache" in line
