"""`save_model`: what lies in the folder, and that the model's other users can read it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from metatokens.baselines.masks import SparseAttentionConfig
from metatokens.data.tokenizer import build_hf_tokenizer, train_tokenizer
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM, MetaTokenModel, export
from metatokens.model.export import AUTO_MAP, REMOTE_CODE, save_model
from tiny_models import MAX_LENGTH, tiny_config, tiny_model, tokens


def test_saved_config_maps_every_auto_class_to_the_code_beside_it(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    heads = {f"AutoModelFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")}
    assert set(AUTO_MAP) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", *heads}
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_saved_folder_has_safetensors_and_code_and_no_pickle(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    code = {f"{name}.py" for name in REMOTE_CODE}
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "custom_generate/generate.py"),
        *code,
    }


def test_importing_the_package_marks_no_class_as_remote_code() -> None:
    # the config brings the code; transformers would name one Auto class of three
    assert [c._auto_class for c in (MetaTokenConfig, MetaTokenModel, MetaTokenForCausalLM)] == [None, None, None]


def test_tied_head_is_not_saved_and_comes_back_tied(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - safe_open has no iterator
    loaded, report = MetaTokenForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert not any(report.values())


@torch.no_grad()
def test_package_wins_over_the_code_in_the_folder_and_asks_for_no_trust(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    (tmp_path / "modeling.py").write_text("raise RuntimeError('this code must not run')\n")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is MetaTokenForCausalLM


@torch.no_grad()
def test_plain_checkpoint_loads_into_a_model_with_meta_attention(tmp_path: Path) -> None:
    # the start of teaching an existing model meta-tokens: the new parts are initialized, the old ones keep their bits
    plain = tiny_model(meta_attention_layers="none")
    save_model(plain, tmp_path)
    config = tiny_config()
    model, report = MetaTokenForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert len(report["missing_keys"]) == 2 * 4 * 2
    assert all(".meta_attn." in name for name in report["missing_keys"])
    text = tokens("xxxxxx")
    assert torch.equal(model(text).logits, plain(text).logits)
    assert model(tokens("x_xx_x")).logits.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_loaded_model_takes_the_backend_asked_for(backend: str, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=backend)
    assert loaded.config._attn_implementation == backend


def assert_code_is_complete(folder: Path) -> None:
    """Check that the config names all Auto classes, and that all of the code lies beside it."""
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in REMOTE_CODE:
        assert (folder / f"{name}.py").read_bytes() == (Path(export.__file__).with_name(f"{name}.py")).read_bytes()


def test_saving_a_new_or_a_loaded_model_by_transformers_brings_the_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "new")
    AutoModelForCausalLM.from_pretrained(tmp_path / "new").save_pretrained(tmp_path / "again")
    AutoModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "decoder")
    for name in ("new", "again", "decoder"):
        assert_code_is_complete(tmp_path / name)


def test_shards_and_a_config_alone_bring_the_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    AutoConfig.from_pretrained(tmp_path / "shards").save_pretrained(tmp_path / "config")
    for name in ("shards", "config"):
        assert_code_is_complete(tmp_path / name)


def test_auto_classes_of_the_users_own_stay_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.auto_map = {"AutoModelForMaskedLM": "mine.Mine", "AutoModel": "owner/repository--modeling.Other"}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == AUTO_MAP | {"AutoModelForMaskedLM": "mine.Mine"}


def test_baseline_made_from_a_loaded_config_names_no_code_and_brings_none(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "plain")
    fields = AutoConfig.from_pretrained(tmp_path / "plain").to_dict()
    config = SparseAttentionConfig.from_dict(fields)
    config.save_pretrained(tmp_path / "sparse")
    assert "auto_map" not in json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == ["config.json"]


def test_saved_tokenizer_knows_the_window_of_its_model(tmp_path: Path) -> None:
    tokenizer = build_hf_tokenizer(train_tokenizer(["the owl sat"], 260))
    save_model(tiny_model(), tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == MAX_LENGTH
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    save_model(tiny_model(rope_parameters=rope), tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 4 * MAX_LENGTH
    endless = tiny_model(memory={"anchors": "meta", "window": 8, "memory_limit": 4, "positions": "compact"})
    save_model(endless, tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == MAX_LENGTH
