"""Training a part of the model: LoRA on one of the attentions, and the one new row of the embedding."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import REMOTE_CODE, save_model
from tiny_models import META, tiny_model, tokens

META_ATTENTION = r".*meta_attn\.(q|k|v|o)_proj"
BOTH_ATTENTIONS = r".*(self|meta)_attn\.(q|k|v|o)_proj"


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_one_step(model: PeftModel) -> None:
    ids = tokens("x_xx_x_x", "xx__xxxx")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    for _ in range(2):  # the first step moves LoRA's zero matrix only
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_lora_without_target_modules_is_refused() -> None:
    # peft has no defaults for a model type it does not know
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny_model(), LoraConfig())


def test_lora_on_meta_attention_trains_nothing_else() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=META_ATTENTION))
    assert len(trained_names(model)) == 2 * 4 * 2  # layers, projections, two factors
    assert all(".meta_attn." in name and "lora_" in name for name in trained_names(model))


@pytest.mark.parametrize("target", [BOTH_ATTENTIONS, ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_lora_on_all_projections_trains_both_attentions(target: str | list[str]) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=target))
    names = trained_names(model)
    assert sum(".meta_attn." in name for name in names) == sum(".self_attn." in name for name in names) == 16


def test_lora_on_meta_attention_changes_logits_of_input_with_meta_tokens_only() -> None:
    base = tiny_model()
    text, mixed = tokens("xxxxxx"), tokens("x_xx_x")
    with torch.no_grad():
        before = base(text).logits, base(mixed).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=META_ATTENTION))
    train_one_step(model)
    with torch.no_grad():
        assert torch.equal(model(text).logits, before[0])
        assert not torch.equal(model(mixed).logits, before[1])


def test_training_the_row_of_the_meta_token_leaves_all_other_rows_alone() -> None:
    base = tiny_model()
    before = base.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(r=2, target_modules=META_ATTENTION, trainable_token_indices={"embed_tokens": [META]})
    model = get_peft_model(base, config)
    train_one_step(model)
    after = model.merge_and_unload().get_input_embeddings().weight
    changed = (after != before).any(-1).nonzero().flatten()
    assert changed.tolist() == [META]


@torch.no_grad()
def test_saved_adapter_loaded_onto_the_saved_model_gives_the_same_bits(tmp_path: Path) -> None:
    base = tiny_model()
    save_model(base, tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=META_ATTENTION, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(MetaTokenForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = tokens("x_xx_x")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_before_a_batch_leave_its_meta_tokens_meta_tokens(config_class: type) -> None:
    # these methods hand embeddings to the model, with the collator's indices as they were
    base = tiny_model()
    ids = tokens("x_xx_x_x", "xx__xxx_")
    meta_indices = (ids == META).nonzero()[:, 1].view(2, 3)
    model = get_peft_model(base, config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        virtual = model.get_prompt(batch_size=2)
        embeds = torch.cat([virtual, base.get_input_embeddings()(ids)], dim=1)
        is_meta = torch.nn.functional.pad(ids == META, (3, 0))
        expected = base(inputs_embeds=embeds, meta_token_mask=is_meta).logits
        for extra in ({}, {"meta_indices": meta_indices}):
            torch.testing.assert_close(model(**inputs, **extra).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_model_is_saved_with_its_code_and_loads_with_the_same_bits(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=META_ATTENTION, init_lora_weights=False))
    merged = model.eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.py")} == set(REMOTE_CODE)
    ids = tokens("x_xx_x")
    assert torch.equal(MetaTokenForCausalLM.from_pretrained(tmp_path)(ids).logits, merged(ids).logits)
