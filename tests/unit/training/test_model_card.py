"""Model cards: what they say, that the hub can read them, and that nobody's own words are written over."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from metatokens.baselines.building import build_config
from metatokens.baselines.landmark import LandmarkForCausalLM
from metatokens.config.attention import LandmarkAttention
from metatokens.config.schema import ModelConfig
from metatokens.errors import CheckpointError
from metatokens.model.export import save_model
from metatokens.model.schedule import NoSchedule, PeriodicSchedule, state_schedule
from metatokens.training.checkpoint import verify_model, write_manifest
from metatokens.training.model_card import Training, write_model_card
from tiny_models import META, tiny_model

TRAINING = Training(
    "pretrain",
    data="allenai/c4",
    base_model="runs/plain",
    numbers={"steps": 40, "text tokens": 12_345, "meta-tokens": 1_234},
    evaluation={"validation_loss": 3.25},
)


def card_of(folder: Path, model: Any, training: Training = TRAINING) -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_model_card(folder, model, training, name="owls")
    return ModelCard.load(folder / "README.md")


def test_card_has_the_metadata_that_the_hub_reads(tmp_path: Path) -> None:
    data = card_of(tmp_path, tiny_model()).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "text-generation")
    assert data.tags == ["metatokens", "meta-tokens", "custom_generate"]
    assert data.datasets == ["allenai/c4"]


def test_model_on_the_hub_is_the_base_and_a_folder_here_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name, base_model, shown in (
        ("EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-125m"),
        ("runs/plain", None, "plain"),
    ):
        card = card_of(tmp_path / shown.replace("/", "-"), tiny_model(), Training("finetune", base_model=name))
        assert card.data.base_model == base_model
        assert f"| started from | {shown} |" in card.text


@pytest.mark.parametrize("data", ["books.txt", "", "generated instances of the recall task copying"])
def test_text_that_is_no_dataset_of_the_hub_is_none_in_the_metadata(tmp_path: Path, data: str) -> None:
    assert card_of(tmp_path, tiny_model(), Training("pretrain", data=data)).data.datasets is None


def test_card_says_the_numbers_of_the_model_and_its_run(tmp_path: Path) -> None:
    model = tiny_model()
    text = card_of(tmp_path, model).text
    meta_attention = sum(p.numel() for layer in model.model.layers for p in layer.meta_attn.parameters())
    assert f"| parameters | {model.num_parameters():,}, {meta_attention:,} in meta-attention |" in text
    for row in ("text tokens | 12,345", "meta-tokens | 1,234", "validation loss | 3.25", "data | allenai/c4"):
        assert f"| {row} |" in text
    endless = tiny_model(memory={"anchors": "meta", "window": 8, "memory_limit": 4, "positions": "compact"})
    for name, of_any_window in (("plain", model), ("endless", endless)):
        assert "| window | 64 positions, meta-tokens included |" in card_of(tmp_path / name, of_any_window).text
    assert "None is recorded." in card_of(tmp_path / "untrained", model, Training("extend")).text


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (PeriodicSchedule(4), '`{"text_tokens": 4, "kind": "periodic"}`'),
        (NoSchedule(), "trained without them"),
        (None, "states no schedule"),
    ],
)
def test_card_says_what_the_meta_tokens_need(tmp_path: Path, schedule: Any, says: str) -> None:
    model = tiny_model()
    state_schedule(model.generation_config, schedule)
    text = card_of(tmp_path, model).text
    assert f"`_PAUSE_`, id {META}." in text
    assert says in text


def test_the_code_of_the_card_loads_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path, model).text, re.DOTALL)
    names: dict[str, Any] = {"path": tmp_path}
    exec(code.split("tokenizer = ")[0], names)
    assert names["model"].num_parameters() == model.num_parameters()


def test_model_whose_code_does_not_travel_says_what_it_needs(tmp_path: Path) -> None:
    shape = ModelConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, attention=LandmarkAttention(every=7)
    )
    card = card_of(tmp_path, LandmarkForCausalLM(build_config(shape, text_vocab_size=20, eos_token_id=0)))
    assert "import metatokens" in card.text
    assert "trust_remote_code" not in card.text
    assert "custom_generate" not in card.data.tags


def test_card_that_its_owner_has_edited_stays_and_the_folder_still_verifies(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    card_of(tmp_path, model)
    write_manifest(tmp_path)
    (tmp_path / "README.md").write_text("My own words.\n")
    verify_model(tmp_path)
    save_model(model, tmp_path)
    write_model_card(tmp_path, model, TRAINING, name="owls")
    assert (tmp_path / "README.md").read_text() == "My own words.\n"


def test_code_in_the_folder_of_a_model_is_verified(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    write_manifest(tmp_path)
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit\n")
    with pytest.raises(CheckpointError, match=r"custom_generate/generate\.py"):
        verify_model(tmp_path)
