"""A model of transformers as an arm: its call, its new rows, and what it saves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from metatokens.baselines.pretrained import PretrainedCausalLM, build_pretrained_on_meta_device, load_pretrained
from metatokens.config.schema import ExplicitInjection
from metatokens.data.injection import inject_meta_tokens
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.evaluation.perplexity import measure_perplexity
from metatokens.evaluation.windows import PerplexityOptions
from metatokens.model.accounting import training_flops
from metatokens.model.loss import targets_of_labels
from metatokens.training.checkpoint import TrainingState, load_checkpoint
from metatokens.training.saving import save_checkpoint
from tiny_models import assert_close, gradients, randomize, tiny_config

TEXT_VOCAB_SIZE = 70
META, PAD = 70, 71


def neo_config(**changes: Any) -> GPTNeoConfig:
    shape = {
        "vocab_size": TEXT_VOCAB_SIZE,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 69,
        "eos_token_id": 69,
    }
    return GPTNeoConfig(**{**shape, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-Neo with large weights, saved as from the hub."""
    model = randomize(GPTNeoForCausalLM(neo_config())).eval()
    model.save_pretrained(tmp_path / "neo")
    return tmp_path / "neo"


def load(folder: Path, **options: Any) -> PretrainedCausalLM:
    model = load_pretrained(folder, text_vocab_size=TEXT_VOCAB_SIZE, **options)
    return model.double().eval()


def ids_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@torch.no_grad()
def test_text_has_the_logits_of_the_model_as_it_came(folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = torch.randint(0, TEXT_VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = load(folder)(ids).logits
    assert logits.shape == (2, 12, 128)
    assert_close(logits[..., :TEXT_VOCAB_SIZE], original(ids).logits, 1e-6)


def test_meta_token_and_padding_follow_the_text_and_rows_are_padded_to_64(folder: Path) -> None:
    model = load(folder)
    assert (model.config.meta_token_id, model.config.pad_token_id, model.config.vocab_size) == (META, PAD, 128)
    assert model.wrapped.generation_config.suppress_tokens == [META, META + 1]
    embedding = model.wrapped.get_input_embeddings().weight
    assert embedding is model.wrapped.get_output_embeddings().weight
    assert embedding[META:].std().item() == pytest.approx(0.02, rel=0.1)
    assert embedding[META:].mean().item() == pytest.approx(0, abs=0.003)


def test_new_rows_are_a_function_of_the_seed_and_leave_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rows = [load(folder, seed=seed).wrapped.get_input_embeddings().weight[META] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("loss_policy", ["skip", "retarget"])
def test_loss_and_gradients_are_those_of_cross_entropy_over_its_logits(folder: Path, loss_policy: str) -> None:
    text = np.random.default_rng(0).integers(0, TEXT_VOCAB_SIZE, (2, 11))
    positions = np.array([[2, 5], [0, 7]])
    batch = inject_meta_tokens(text, positions, meta_token_id=META, loss_policy=loss_policy)
    inputs = batch.to_model_inputs(device="cpu")
    assert "meta_indices" in inputs
    model = load(folder, loss_policy=loss_policy)
    logits = model(inputs["input_ids"]).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["shift_labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    (expected / 7).backward()
    wanted = gradients(model)
    model.train()
    model.zero_grad()
    outputs = model(**inputs, num_items_in_batch=7, use_cache=False)
    outputs.loss.backward()
    assert outputs.logits is None
    assert_close(outputs.loss, expected / 7, 1e-5)
    for name, gradient in gradients(model).items():
        assert_close(gradient, wanted[name], 1e-4)


@pytest.mark.parametrize("is_training", [True, False])
def test_what_sits_on_the_head_counts_in_the_loss(folder: Path, is_training: bool) -> None:
    model = load(folder)
    ids = ids_of([1, 2, META, 3, 4])
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: 2 * logits)
    targets = targets_of_labels(ids, ids == META, "skip")
    expected = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    assert_close(model.train(is_training)(ids, labels=ids).loss, expected, 1e-5)


def test_labels_are_targets_under_the_loss_policy(folder: Path) -> None:
    ids = ids_of([1, 2, META, 3, 4])
    model = load(folder, loss_policy="retarget")
    targets = targets_of_labels(ids, ids == META, "retarget")
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=targets).loss)


@torch.no_grad()
def test_a_left_padded_row_has_the_logits_of_the_row_alone(folder: Path) -> None:
    model = load(folder)
    row = ids_of([1, 2, META, 3, 4, 5, 6])
    padded = torch.cat([torch.full((1, 3), PAD), row], dim=1)
    mask = (padded != PAD).long()
    assert_close(model(padded, attention_mask=mask).logits[:, 3:], model(row).logits, 1e-5)


@torch.no_grad()
def test_cached_logits_equal_uncached(folder: Path) -> None:
    model = load(folder)
    ids = ids_of([PAD, PAD, 1, 2, META, 3, 4, 5], [6, 7, 8, META, 9, 10, 11, 12])
    mask = (ids != PAD).long()
    cache = None
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        outputs = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    assert_close(torch.cat(pieces, 1)[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], 1e-5)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(folder: Path) -> None:
    model, ids = load(folder), ids_of([1, 2, 3, 4])
    assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, 2:], 1e-6)


@torch.no_grad()
def test_what_it_saves_is_an_ordinary_checkpoint_that_comes_back_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder, seed=3), ids_of([1, 2, META, 3])
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(plain) is GPTNeoForCausalLM
    assert torch.equal(plain(ids).logits, model(ids).logits)
    again = load(tmp_path / "saved", seed=4)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_training_checkpoint_restores_it_to_the_bit(folder: Path, tmp_path: Path) -> None:
    ids = ids_of([1, 2, META, 3, 4])

    def build(seed: int) -> tuple[PretrainedCausalLM, torch.optim.Optimizer]:
        model = load(folder, seed=seed).train()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(model: PretrainedCausalLM, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    model, optimizer = build(0)
    step(model, optimizer)
    path = save_checkpoint(
        tmp_path, model, optimizer, TrainingState(step=1, content_id="x", world_size=1), tokenizer=None, keep=1
    )
    other, other_optimizer = build(1)
    load_checkpoint(path, other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        step(*pair)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@torch.no_grad()
def test_an_untied_head_gets_rows_of_its_own_and_unused_rows_are_drawn_anew(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    randomize(GPTNeoXForCausalLM(config)).save_pretrained(tmp_path)
    model = load(tmp_path)
    embedding, head = model.wrapped.get_input_embeddings().weight, model.wrapped.get_output_embeddings().weight
    assert embedding is not head
    assert len(embedding) == len(head) == 128
    for weight in (embedding, head):
        assert weight[META:].std().item() == pytest.approx(0.02, rel=0.1)
        assert weight[:META].std().item() > 0.1


def test_the_operations_of_a_gpt2_are_those_that_our_plain_model_counts(tmp_path: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 128}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=69, eos_token_id=69)).save_pretrained(tmp_path)
    ours = tiny_config(meta_attention_layers="none", position_encoding="learned", vocab_size=128)
    model = load(tmp_path)
    assert model.config.vocab_size == 128
    for counted in ({"num_positions": 64}, {"num_positions": 20, "num_meta": 3}, {"num_positions": 9, "num_logits": 2}):
        assert model.training_flops(**counted) == training_flops(ours, **counted)


def test_a_model_on_the_meta_device_counts_what_the_loaded_one_does(folder: Path) -> None:
    model, on_meta = load(folder), build_pretrained_on_meta_device(folder, text_vocab_size=TEXT_VOCAB_SIZE)
    assert on_meta.device.type == "meta"
    assert on_meta.num_parameters() == model.num_parameters()
    assert on_meta.training_flops(num_positions=20) == model.training_flops(num_positions=20)
    for name in ("meta_token_id", "pad_token_id", "vocab_size", "loss_policy"):
        assert getattr(on_meta.config, name) == getattr(model.config, name)


def test_a_loss_policy_is_kept_unless_another_is_asked_for(folder: Path, tmp_path: Path) -> None:
    load(folder, loss_policy="retarget").save_pretrained(tmp_path / "saved")
    assert load(folder).config.loss_policy == "skip"
    assert load(tmp_path / "saved").config.loss_policy == "retarget"
    assert load(tmp_path / "saved", loss_policy="skip").config.loss_policy == "skip"


def test_weights_that_the_config_does_not_describe_are_refused_by_name(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "attention_layers": ["global"] * 4}
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ValueError, match=r"no transformer\.h\.2\."):
        load(folder)


def test_a_model_with_too_few_rows_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="70 rows in its embedding, fewer than the 80"):
        load_pretrained(folder, text_vocab_size=80)


def test_a_model_whose_logits_are_more_than_a_linear_head_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=TEXT_VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        final_logit_softcapping=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    randomize(Gemma2ForCausalLM(config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="linear head"):
        load(tmp_path)


@torch.no_grad()
def test_generation_never_gives_a_meta_token(folder: Path) -> None:
    model = load(folder)
    weight = model.wrapped.get_input_embeddings().weight
    weight[[META, META + 1]] = 50 * weight[1]  # would win every time
    generated = model.generate(ids_of([1, 2, 3]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert not ((generated == META) | (generated == META + 1)).any()


def test_perplexity_with_injected_meta_tokens_is_that_of_its_own_logits(tmp_path: Path) -> None:
    text = "the owl sat, and the owl saw: a mouse; the mouse ran! "
    tokenizer = train_tokenizer([text] * 3, 270)
    encoder = TextEncoder(tokenizer)
    randomize(GPTNeoForCausalLM(neo_config(vocab_size=encoder.vocab_size))).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, text_vocab_size=encoder.vocab_size).double().eval()
    options = PerplexityOptions(window=16, injection=ExplicitInjection(positions=(2, 5)))
    result = measure_perplexity(model, [("text", text)], tokenizer, options)
    # the first window by hand: 16 text tokens, the first an end of text, and two meta-tokens
    ids = [encoder.eos_token_id, *encoder.encode_batch([text])[0].tolist()]
    row = [*ids[:2], model.config.meta_token_id, *ids[2:4], model.config.meta_token_id, *ids[4:16]]
    targets = [ids[1], -100, ids[2], ids[3], -100, *ids[4:17]]
    loss = model(ids_of(row), shift_labels=ids_of(targets)).loss
    one_window = measure_perplexity(
        model, [("text", text)], tokenizer, options.model_copy(update={"max_tokens_per_document": 16})
    )
    assert one_window.nats_per_token.estimate == pytest.approx(loss.item(), rel=1e-5)
    assert result.text_tokens == len(ids) - 1
