"""A saved graft computes the same again, only on its own base; a full folder is the plain base to everyone else."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, cache_utils

from grafted_models import CONFIG, LENGTH, ids, largest, make, plain, trained
from metatokens.errors import CheckpointError, UsageError
from metatokens.evaluation.eviction import POLICIES, Budget, Reader
from metatokens.graft import Graft, GraftConfig, graft, load_graft, save_graft, switched_off
from metatokens.model.cache import MetaDynamicLayer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids(), use_cache=False).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    plain("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers run code of checkpoints from a folder of the test's own, as a new process does."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    folder = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.setattr(sys, "path", [folder, *sys.path])
    for name in ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING"):
        monkeypatch.setattr(cache_utils, name, dict(getattr(cache_utils, name)))  # which a copy of the cache enters
    forget()
    yield
    forget()


def test_an_adapter_is_loaded_onto_its_base_and_refused_for_another(base: Path, tmp_path: Path) -> None:
    model = graft(AutoModelForCausalLM.from_pretrained(base), CONFIG)
    with torch.no_grad():
        for parameter in model.metatokens_graft.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_graft(model, tmp_path / "new" / "adapter")
    assert {file.name for file in (tmp_path / "new" / "adapter").iterdir()} == {"config.json", "graft.safetensors"}
    expected = logits(model)
    assert torch.equal(logits(load_graft(tmp_path / "new" / "adapter")), expected)
    # the type of the base's weights does not count
    half = load_graft(tmp_path / "new" / "adapter", AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    assert half.metatokens_graft.config == CONFIG
    other = make("llama")
    with torch.no_grad():
        other.model.norm.weight[3] *= 1.01
    with pytest.raises(CheckpointError, match="found another model"):
        load_graft(tmp_path / "new" / "adapter", other)
    assert not hasattr(other, "metatokens_graft")


def test_a_full_folder_opens_as_the_plain_base_by_code_of_transformers_alone(tmp_path: Path) -> None:
    model = trained("llama", dtype=torch.float32)
    save_graft(model, tmp_path / "full", full=True)
    again = load_graft(tmp_path / "full")
    assert torch.equal(logits(again), logits(model))
    saved = load_file(tmp_path / "full" / "model.safetensors")
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in make("llama", dtype=torch.float32).state_dict().items()
    )
    assert not hasattr(model.config, "auto_map")
    opened, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert type(opened) is LlamaForCausalLM
    assert not any(notes.values())
    assert torch.equal(logits(opened), logits(make("llama", dtype=torch.float32)))


@pytest.mark.usefixtures("_own_modules")
def test_a_full_folder_opens_grafted_by_its_own_code(tmp_path: Path) -> None:
    model = trained("llama", dtype=torch.float32)
    save_graft(model, tmp_path / "full", full=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "full", trust_remote_code=True)
    assert type(opened) is LlamaForCausalLM
    assert type(opened.metatokens_graft) is Graft  # the package's own, since it is imported
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["meta_attention"] is MetaDynamicLayer
    assert torch.equal(logits(opened), logits(model))
    assert not torch.equal(logits(opened), logits(make("llama", dtype=torch.float32)))
    # without a graft's file and code beside it, it names none
    opened.save_pretrained(tmp_path / "base")
    assert "auto_map" not in json.loads((tmp_path / "base" / "config.json").read_text())


@pytest.mark.usefixtures("_own_modules")
def test_a_model_of_the_code_beside_its_weights_is_saved_by_the_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("llama", dtype=torch.float32)
    save_graft(model, tmp_path / "full", full=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "metatokens", None)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "full", trust_remote_code=True)
    assert type(opened.metatokens_graft) is not Graft
    with pytest.raises(ValueError, match="expected save_graft of the package metatokens"):
        opened.save_pretrained(tmp_path / "again")
    with switched_off(opened):
        assert torch.equal(logits(opened), logits(make("llama", dtype=torch.float32)))
    save_graft(opened, tmp_path / "again", full=True)
    for file in (tmp_path / "full").iterdir():
        # a graft's own file names the folder that its base was opened from
        assert file.name == "graft.safetensors" or (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(logits(load_graft(tmp_path / "again")), logits(model))


def test_a_file_that_is_no_graft_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    model = trained("llama")
    save_graft(model, tmp_path / "graft")
    with pytest.raises(UsageError, match="a new folder"):
        save_graft(model, tmp_path / "graft")
    with pytest.raises(UsageError, match="found a plain one"):
        save_graft(plain("llama"), tmp_path / "other")
    file = tmp_path / "graft" / "graft.safetensors"
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match="its base"):
        load_graft(tmp_path / "graft")  # a model that was made in memory has no name
    for damaged in (
        content[: len(content) // 2],
        b"",
        content.replace(b"graft of metatokens 1", b"graft of something  1"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="a graft of metatokens"):
            load_graft(tmp_path / "graft", make("llama"))
    with pytest.raises(CheckpointError, match="a graft of metatokens"):
        load_graft(base)
    file.write_bytes(content)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file(tensors, file, {**header, "config": '{"window": 0}'})
    with pytest.raises(CheckpointError, match="window"):
        load_graft(tmp_path / "graft", make("llama"))
    del tensors["row"]
    save_file(tensors, file, header)
    model = make("llama")
    with pytest.raises(CheckpointError, match="row"):
        load_graft(tmp_path / "graft", model)
    assert not hasattr(model, "metatokens_graft")


def test_a_config_that_no_graft_has_is_refused_in_one_line() -> None:
    for field, value in {"window": 0, "num_sinks": -1, "every": 2.5, "memory_limit": 0, "lora_rank": -1}.items():
        with pytest.raises(ValueError, match=f"GraftConfig.{field} must be a whole number of at least ., not {value}"):
            GraftConfig(**{field: value})
    for field in ("anchors", "reveal", "positions"):
        with pytest.raises(ValueError, match=rf"GraftConfig.{field} must be one of \(.*\), not 'no'"):
            GraftConfig(**{field: "no"})
    with pytest.raises(ValueError, match="GraftConfig has no depth; it has window, "):
        GraftConfig.read({"depth": 2})
    for nothing in (None, [], 1):
        with pytest.raises(ValueError, match="GraftConfig must be an object"):
            GraftConfig.read(nothing)


def test_peft_trains_a_grafted_model_and_the_graft_is_saved_without_it(tmp_path: Path) -> None:
    model = trained("llama", dtype=torch.float32)
    expected = logits(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    assert largest(logits(wrapped) - expected) < 1e-5
    wrapped.train()(ids(), labels=ids()).loss.backward()
    gradients = {name for name, one in wrapped.named_parameters() if one.grad is not None}
    assert gradients
    assert all("lora_" in name for name in gradients)
    with pytest.raises(UsageError, match="adapters of PEFT"):
        save_graft(model, tmp_path / "graft")
    bare = wrapped.unload().eval()
    assert isinstance(bare, LlamaForCausalLM)
    save_graft(bare, tmp_path / "graft")
    again = load_graft(tmp_path / "graft", make("llama", dtype=torch.float32))
    assert torch.equal(logits(again), expected)


def test_the_long_context_reader_reads_a_grafted_model_in_its_own_cache() -> None:
    model = trained("llama")
    budget = Budget(columns=14, length=LENGTH, sinks=2, window=6)
    reader = Reader(model, POLICIES["full"], budget)
    text = ids()
    read = torch.cat([reader.read(text[:, :20]), reader.read(text[:, 20:])], 1)
    assert largest(read - logits(model)) < 1e-10
    assert reader.count_columns() == [2 + 6 + (LENGTH // 3)]
    # keys and values of two layers, each of two heads of eight float64 numbers
    assert reader.count_bytes() == reader.count_columns()[0] * 2 * 2 * 2 * 8 * 8
    with pytest.raises(UsageError, match=r"found a grafted one.*policy full alone"):
        Reader(model, POLICIES["sinks"], budget)
