"""What landmark attention refuses, and that its switches do what they say."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.cache_utils import StaticCache

from baseline_models import baseline_model
from metatokens.baselines.landmark import LandmarkConfig, read_best_blocks
from metatokens.config.loading import load_preset
from metatokens.errors import UsageError
from tiny_models import tokens


@pytest.mark.parametrize("field", ["landmark_every", "num_best_blocks"])
def test_a_number_below_one_is_refused(field: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field} must be at least 1"):
        LandmarkConfig(**{field: 0})


def test_reading_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="num_best_blocks"):
        read_best_blocks(baseline_model("landmark"), 0)


@pytest.mark.parametrize("name", ["landmark", "longformer_meta"])
def test_a_static_cache_has_no_place_for_landmarks(name: str) -> None:
    with pytest.raises(KeyError, match="marked_attention"):
        StaticCache(config=baseline_model(name).config, max_cache_len=16)


def test_a_cache_of_another_model_is_refused() -> None:
    from transformers.cache_utils import DynamicCache

    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)"):
        baseline_model("landmark")(
            tokens("xx_x"), past_key_values=DynamicCache(config=baseline_model("sliding_window").config)
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--injection.kind", "none"), ("landmark", "injection.kind")),
        (("--injection.ratio", "0.1"), ("model.attention.every 46", "injection.ratio 0.1")),
        (("--model.attention.every", "20"), ("model.attention.every 20", "11 landmarks")),
        (
            ("--model.attention.window", "20"),
            (
                "model.attention.window",
                "it needs --model.attention.kind block_recurrent or --model.attention.kind blockwise or "
                "--model.attention.kind longformer or "
                "--model.attention.kind memory or --model.attention.kind sliding_window",
            ),
        ),
        (("--model.attention", "{kind: sliding_window, layers: [9]}"), ("model.attention.layers [9]", "4 layers")),
        (("--model.meta_attention_over", "all"), ("model.meta_attention_over all", "model.meta_attention_layers")),
    ],
)
def test_settings_that_do_not_agree_name_their_keys(overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("tiny/landmark", overrides)
    for word in words:
        assert word in str(caught.value)


def test_landmarks_at_random_places_need_no_agreement() -> None:
    assert load_preset("tiny/landmark", ["--injection", "{kind: uniform, ratio: 0.1}"]).injection.kind == "uniform"
