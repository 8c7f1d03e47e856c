"""`MetaTokenModel` and `MetaTokenForCausalLM` as Hugging Face models: inputs, outputs, masks, memory and graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.attention import SelfAttention
from metatokens.model.meta_attention import MetaAttention
from tiny_models import ENCODINGS, MAX_LENGTH, META, assert_close, attention_mask_of, gradients, tiny_model, tokens

IDS = tokens("x_xx_x_xx", "xxxx_xxxx")


@contextmanager
def count_calls(model: nn.Module, module_class: type[nn.Module]) -> Iterator[list[nn.Module]]:
    calls: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: calls.append(module))
        for module in model.modules()
        if isinstance(module, module_class)
    ]
    yield calls
    for handle in handles:
        handle.remove()


# Which tokens are meta-tokens -----------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_with_meta_token_mask_give_the_logits_of_the_ids() -> None:
    model = tiny_model()
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds, meta_token_mask=IDS == META).logits, model(IDS).logits)


@pytest.mark.parametrize("over", ["meta", "all"])
@torch.no_grad()
def test_embeddings_alone_give_the_logits_of_the_ids(over: str) -> None:
    model = tiny_model(meta_attention_over=over)
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(IDS).logits)


@torch.no_grad()
def test_the_collators_indices_stay_right_behind_virtual_tokens() -> None:
    # prompt tuning puts embeddings of its own before those of the collator's batch
    model = tiny_model(dtype=torch.float64)
    meta_indices = (IDS == META).nonzero()[:2, 1].expand(2, -1)
    ids = tokens("x_xx_xxxx", "xxxx_xxx_")
    embeds = torch.cat([torch.randn(2, 3, 32, dtype=torch.float64), model.get_input_embeddings()(ids)], dim=1)
    is_meta = nn.functional.pad(ids == META, (3, 0))
    expected = model(inputs_embeds=embeds, meta_token_mask=is_meta).logits
    assert torch.equal(model(inputs_embeds=embeds, meta_indices=meta_indices).logits, expected)


@pytest.mark.parametrize("kind", ["ids", "embeddings"])
def test_indices_of_another_number_of_meta_tokens_are_refused(kind: str) -> None:
    model = tiny_model()
    # embeddings between those of tokens, as along the path of integrated gradients, are those of no token
    inputs = {"input_ids": IDS} if kind == "ids" else {"inputs_embeds": 0.5 * model.get_input_embeddings()(IDS)}
    with pytest.raises(ValueError, match="meta_indices give 2 meta-tokens a row, but the inputs hold"):
        model(**inputs, meta_indices=torch.tensor([[1, 4], [4, 5]]))


@torch.no_grad()
def test_meta_token_mask_takes_the_place_of_the_ids() -> None:
    model = tiny_model()
    shifted = (IDS == META).roll(1, dims=1)
    assert not torch.equal(model(IDS, meta_token_mask=shifted).logits, model(IDS).logits)


@torch.no_grad()
def test_model_without_a_meta_token_id_sees_text_only() -> None:
    model = tiny_model(meta_token_id=None)
    no_meta = torch.zeros_like(IDS, dtype=torch.bool)
    assert torch.equal(model(IDS).logits, tiny_model()(IDS, meta_token_mask=no_meta).logits)


@pytest.mark.parametrize("given", [("input_ids", "inputs_embeds"), ()])
def test_both_or_neither_kind_of_input_raises(given: tuple[str, ...]) -> None:
    model = tiny_model()
    inputs = {"input_ids": IDS, "inputs_embeds": model.get_input_embeddings()(IDS)}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**{name: inputs[name] for name in given})


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (IDS + 1000, "expected ids from 0 to"),
        (IDS.where(IDS.max() != IDS, -1), "found -1 to"),
        (IDS.float(), "of torch.float32"),
        (IDS[0], "expected \\(batch, tokens\\)"),
    ],
)
def test_ids_that_are_none_raise(ids: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        tiny_model()(ids)


# What runs when -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_inference_without_meta_tokens_skips_meta_attention() -> None:
    # flash attention refuses a query of length zero
    model = tiny_model()
    with count_calls(model, MetaAttention) as calls:
        model(tokens("xxxx"))
    assert calls == []


def test_training_without_meta_tokens_runs_meta_attention_all_the_same() -> None:
    # a process whose parameters took no part would leave the others waiting for their gradients
    model = tiny_model().train()
    with count_calls(model, MetaAttention) as calls:
        model(tokens("xxxx"))
    assert len(calls) == 2


@pytest.mark.parametrize("layers", ["none", [1]])
def test_block_without_meta_attention_has_no_meta_parameters(layers: str | list[int]) -> None:
    names = [name for name, _ in tiny_model(meta_attention_layers=layers).named_parameters()]
    assert {name.split(".")[2] for name in names if ".meta_attn." in name} == ({"1"} if layers == [1] else set())


def test_meta_layernorm_has_no_parameters() -> None:
    assert not [name for name, _ in tiny_model().named_parameters() if "meta_layernorm" in name]


# Positions and masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_positions_that_do_not_step_by_one_are_no_packed_documents(backend: str) -> None:
    # transformers would cut the causal mask where positions restart, unless a mask or a cache is given
    model = tiny_model(attn_implementation=backend, use_cache=False)
    position_ids = torch.arange(IDS.shape[1]).expand_as(IDS).masked_fill(IDS == META, 0)
    with_mask = model(IDS, position_ids=position_ids, attention_mask=torch.ones_like(IDS)).logits
    assert_close(model(IDS, position_ids=position_ids).logits, with_mask, 1e-6)


@torch.no_grad()
def test_given_positions_reach_both_attentions() -> None:
    model = tiny_model(dtype=torch.float64)
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    # RoPE sees differences only, so all positions may move together but not apart
    assert_close(model(IDS, position_ids=positions + 7).logits, model(IDS).logits, 1e-4)
    assert (model(IDS, position_ids=3 * positions).logits - model(IDS).logits).abs().max() > 0.01


@torch.no_grad()
def test_nothing_of_the_token_stream_reaches_the_meta_attentions_kernel() -> None:
    # flash attention would take cu_seq_lens of the tokens for those of the packed meta-tokens
    seen: dict[type[nn.Module], set[str]] = {}

    def recording(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.setdefault(type(module), set()).update(kwargs)
        return sdpa_attention_forward(module, *tensors, dropout=kwargs["dropout"], scaling=kwargs["scaling"])

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    model = tiny_model(attn_implementation="recording")
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    model(IDS[:1], position_ids=torch.arange(9)[None], cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    assert seen[MetaAttention] == {"dropout", "scaling"}
    assert seen[SelfAttention] == {"dropout", "scaling", "cu_seq_lens_q", "cu_seq_lens_k"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_too_long_input_raises_an_error_that_names_both_lengths(encoding: str) -> None:
    model = tiny_model(position_encoding=encoding)
    with pytest.raises(ValueError, match=f"{MAX_LENGTH + 1} positions .* {MAX_LENGTH} "):
        model(tokens("x" * (MAX_LENGTH + 1)))


@torch.no_grad()
def test_input_that_grows_too_long_in_the_cache_raises() -> None:
    model = tiny_model()
    cache = model(tokens("x" * MAX_LENGTH), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"{MAX_LENGTH + 1} positions"):
        model(tokens("x"), past_key_values=cache)


@torch.no_grad()
def test_input_of_the_models_full_length_gives_logits() -> None:
    ids = tokens("x_xx" * (MAX_LENGTH // 4))
    assert tiny_model()(ids).logits.isfinite().all()


@pytest.mark.parametrize("layers", ["all", "none"])
@pytest.mark.parametrize(
    "make",
    [
        lambda config: DynamicCache(config=replaced(config, num_hidden_layers=3)),
        lambda config: StaticCache(config=replaced(config, num_hidden_layers=1), max_cache_len=16),
        lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        lambda _: ((torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)),) * 2,
    ],
)
def test_a_cache_of_another_kind_or_model_is_refused_in_one_line(make: Any, layers: str) -> None:
    model = tiny_model(meta_attention_layers=layers)
    with pytest.raises(ValueError, match=r"use DynamicCache\(config=model\.config\)"):
        model(IDS, past_key_values=make(model.config))


@pytest.mark.parametrize(
    "make",
    [
        lambda config: DynamicCache(),  # noqa: ARG005 - one of the makers
        lambda config: DynamicCache(config=replaced(config, meta_attention_layers=[0])),
        lambda config: StaticCache(config=replaced(config, meta_attention_layers="none"), max_cache_len=16),
    ],
)
def test_a_cache_without_a_place_for_meta_tokens_is_refused_in_one_line(make: Any) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"meta-tokens: use DynamicCache\(config=model\.config\)"):
        model(IDS, past_key_values=make(model.config))


def replaced(config: MetaTokenConfig, **changes: Any) -> MetaTokenConfig:
    return MetaTokenConfig(**{**config.to_dict(), **changes})


@torch.no_grad()
def test_a_model_without_meta_attention_takes_a_cache_of_no_config() -> None:
    model = tiny_model(meta_attention_layers="none")
    cache = DynamicCache()
    model(IDS[:, :5], past_key_values=cache)
    assert_close(model(IDS[:, 5:], past_key_values=cache).logits, model(IDS).logits[:, 5:], 1e-5)


def test_alibi_with_a_backend_that_takes_no_bias_raises() -> None:
    model = tiny_model(position_encoding="alibi", attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="alibi"):
        model(IDS)


# Outputs --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_eager_model_returns_attentions_of_all_tokens_and_of_packed_meta_tokens() -> None:
    model = tiny_model(attn_implementation="eager", meta_attention_layers=[1])
    outputs = model(IDS, output_attentions=True, output_meta_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 9, 9)] * 2
    assert [weights.shape for weights in outputs.meta_attentions] == [(2, 4, 3, 3)]
    assert len(outputs.hidden_states) == 2 + 1
    assert_close(outputs.meta_attentions[0].sum(-1), torch.ones(2, 4, 3, dtype=torch.float64), 1e-6)


@torch.no_grad()
def test_attentions_are_returned_only_when_asked_for() -> None:
    outputs = tiny_model(attn_implementation="eager")(IDS)
    assert outputs.attentions is outputs.meta_attentions is outputs.hidden_states is None


@torch.no_grad()
def test_logits_to_keep_gives_the_last_logits_or_those_of_the_indices() -> None:
    model = tiny_model()
    logits = model(IDS).logits
    assert_close(model(IDS, logits_to_keep=2).logits, logits[:, -2:], 1e-6)
    assert_close(model(IDS, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]], 1e-6)


def test_training_with_labels_makes_no_logits_and_evaluation_does() -> None:
    model = tiny_model()
    assert model.train()(IDS, labels=IDS).logits is None
    assert model.eval()(IDS, labels=IDS).logits is not None


@torch.no_grad()
def test_outputs_as_a_tuple_start_with_the_loss() -> None:
    model = tiny_model()
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert torch.equal(loss, model(IDS, labels=IDS).loss)
    assert torch.equal(logits, model(IDS).logits)


def test_loss_without_any_text_to_predict_is_zero_with_finite_gradients() -> None:
    model = tiny_model().train()
    loss = model(tokens("____"), labels=tokens("____")).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_later_tokens_change_no_earlier_logit() -> None:
    model = tiny_model(dtype=torch.float64)
    whole = tokens("x_xx_x__x_xx")
    for length in (1, 2, 5, 8):
        assert_close(model(whole[:, :length]).logits, model(whole).logits[:, :length], 1e-10)


def test_tied_head_is_the_embedding() -> None:
    model, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


@torch.no_grad()
def test_resized_vocabulary_keeps_the_tie_and_the_logits_of_the_old_tokens() -> None:
    model = tiny_model()
    before = model(IDS).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_close(model(IDS).logits[..., :24], before, 1e-6)


# Training -------------------------------------------------------------------------------------------------------


def step(model: MetaTokenForCausalLM, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(use_reentrant: bool) -> None:
    model = tiny_model().train()
    ids = tokens("x_xx_x", "......") if use_reentrant else IDS
    inputs = {"attention_mask": attention_mask_of(ids), "use_cache": False}
    loss, expected = step(model, ids, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    checkpointed_loss, checkpointed = step(model, ids, **inputs)
    assert torch.equal(checkpointed_loss, loss)
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(checkpointed[name], gradient, 1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_leaves_a_cache_empty_and_the_gradients_right(
    is_given: bool, use_reentrant: bool
) -> None:
    model = tiny_model(dtype=torch.float64).train()
    loss, expected = step(model, IDS, use_cache=False)
    cache = DynamicCache(config=model.config)
    inputs: dict[str, Any] = {"past_key_values": cache} if is_given else {"use_cache": True}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed_loss, checkpointed = step(model, IDS, **inputs)
    assert cache.get_seq_length() == 0
    assert_close(checkpointed_loss, loss, 1e-12)
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(checkpointed[name], gradient, 1e-10)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_on_top_of_cached_tokens_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        cache = model(IDS).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=f"needs an empty cache, not one of {IDS.shape[1]} tokens"):
        model(IDS, past_key_values=cache)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model(hidden_dropout=0.5, attention_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
        torch.manual_seed(0)
        first, second = model.train()(IDS).logits, model(IDS).logits
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["meta", "cross"])
def test_training_steps_of_many_batches_are_one_compiled_graph_with_the_same_gradients(over: str) -> None:
    # of one layer: compiling takes as long as everything else in this file
    model, compiled_model = (tiny_model(num_hidden_layers=1, meta_attention_over=over).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()  # another test in this process may have compiled the same code for other shapes
    compiled_model.forward = torch.compile(compiled_model.forward, backend=counter, fullgraph=True)
    rows = [("x_xx_x_xx", "xxxx___xx"), ("_x_xx_xxx", "xx_x_xx_x"), ("___xxxxxx", "xxxxxx___")]
    try:
        for number, pictures in enumerate(rows):
            ids = tokens(*pictures, seed=number)
            inputs = {
                "meta_indices": (ids == META).nonzero()[:, 1].view(2, 3),
                "num_items_in_batch": torch.full((), 7.0 + number),
                "use_cache": False,
            }
            loss, expected = step(model, ids, **inputs)
            compiled_loss, compiled = step(compiled_model, ids, **inputs)
            assert_close(compiled_loss, loss, 1e-12)
            for name, gradient in expected.items():
                assert_close(compiled[name], gradient, 1e-10)
    finally:
        torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.parametrize("over", ["meta", "all", "random", "cross", "gather"])
def test_exported_program_finds_the_meta_tokens_of_other_inputs(over: str) -> None:
    model = tiny_model(meta_attention_over=over, random_ratio=0.4)
    program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}).module()
    with torch.no_grad():
        for ids in (tokens("___xxx_xx", "xxxxxxxxx"), tokens("xxxxxxxxx", "xxxxxxxx_")):
            assert_close(program(input_ids=ids, use_cache=False).logits, model(ids).logits, 1e-5)


def test_exported_program_sorts_as_every_exporter_knows() -> None:
    program = torch.export.export(tiny_model(), (), {"input_ids": IDS, "use_cache": False})
    assert not [node for node in program.graph.nodes if "stable" in str(node.target)]


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_without_meta_indices_gives_the_logits_of_each_documents_row() -> None:
    model = tiny_model(num_hidden_layers=1)  # tracing takes as long for every layer
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    try:
        for inputs in ({}, {"position_ids": position_ids}):
            assert_close(compiled(IDS, use_cache=False, **inputs).logits, model(IDS, **inputs).logits, 1e-5)
    finally:
        torch._dynamo.reset()


def test_class_names_hold_no_word_by_which_transformers_denies_a_dynamic_cache() -> None:
    assert tiny_model()._supports_default_dynamic_cache()
