"""A model opens with exactly the weights that its config describes, or not at all."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metatokens.errors import CheckpointError
from metatokens.model.export import save_model
from metatokens.training.loading import ModelFolder, open_model

if TYPE_CHECKING:
    from conftest import Training


@pytest.fixture
def folder(training: "Training", tmp_path: Path) -> Path:
    save_model(training.model, tmp_path / "model", training.tokenizer)
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one line of an error with exit code 4, beside which nothing is said."""
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    assert caught.value.exit_code == 4
    assert capfd.readouterr() == ("", "")
    return str(caught.value)


def test_a_saved_model_opens_with_its_weights(
    training: "Training", folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = open_model(folder)
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in training.model.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, "no model.layers.2.input_layernorm.bias"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.bias, which the model lacks"),
        ({"meta_attention_layers": "none"}, "model.layers.0.meta_attn.k_proj.bias, which the model lacks"),
        ({"position_encoding": "learned", "rope_parameters": None}, "no model.embed_positions.weight"),
        ({"tie_word_embeddings": False}, "no lm_head.weight"),
        ({"vocab_size": 640}, "model.embed_tokens.weight of (320, 16), not (640, 16)"),
    ],
)
def test_weights_that_the_config_does_not_describe_are_refused_by_name(
    folder: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    change_config(folder, **changes)
    assert f"found {named};" in refusal(folder, capfd)


def test_weights_that_lack_a_tensor_or_have_one_more_are_refused_by_name(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "found no model.norm.weight;" in refusal(folder, capfd)
    save_file(
        {**weights, "model.norm.weight": norm, "extra": norm.clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "found extra, which the model lacks;" in refusal(folder, capfd)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "geluu"}, "geluu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"position_encoding": "wrong"}, "position_encoding"),
        ({"meta_attention_layers": ["a"]}, "meta_attention_layers"),
        ({"dtype": "float9"}, "float9"),
        ({"id2label": 3}, "int"),
        ({"model_type": "gpt2"}, "are not those that its config describes: no lm_head.weight"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(
    folder: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    change_config(folder, **changes)
    assert named in refusal(folder, capfd)


def test_a_config_that_is_no_mapping_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text("[]")
    assert "found a list" in refusal(folder, capfd)


def test_the_digest_of_a_model_is_of_its_weights_and_config_but_not_of_the_version_that_wrote_it(folder: Path) -> None:
    digest = ModelFolder(folder).sha256
    change_config(folder, transformers_version="0.0")
    assert ModelFolder(folder).sha256 == digest
    change_config(folder, hidden_dropout=0.5)
    assert ModelFolder(folder).sha256 != digest


def test_what_a_model_folder_holds_is_found_from_the_run_and_read_once(folder: Path) -> None:
    run = ModelFolder(folder.parent)
    assert run.path == folder
    assert run.tokenizer is run.tokenizer
    assert run.is_ours
    assert (run.shape.num_hidden_layers, run.pretraining, run.finetuning) == (2, None, None)


def test_a_folder_without_a_model_is_refused_when_something_of_it_is_asked_for(tmp_path: Path) -> None:
    empty = ModelFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a folder with config\.json, found none"):
        empty.tokenizer  # noqa: B018 - reading it is the test


def test_a_run_that_has_not_ended_is_told_from_no_run(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="this run has no checkpoint yet"):
        ModelFolder(tmp_path / "run").check_path()
    (tmp_path / "run/checkpoints/step-00000004").mkdir()
    with pytest.raises(CheckpointError, match=r"found a run that has not ended; name its checkpoint .*step-00000004"):
        ModelFolder(tmp_path / "run").check_path()
