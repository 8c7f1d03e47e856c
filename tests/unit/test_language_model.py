"""One object for a model and its tokenizer: it says what the functions beneath say, and takes what people have."""

import re
from dataclasses import fields, replace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import metatokens as mt
from metatokens.config.finetuning import EvaluateConfig
from metatokens.data.tokenizer import TextEncoder
from metatokens.tasks.base import PieceEncoder
from tiny_models import randomize

TEXTS = ["the owl sat, and the owl saw: a mouse; the mouse ran!", "where did it run? into the night, owl."]
TINY = mt.ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
WHOLE = {"max_text_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    lm = mt.LanguageModel.from_scratch(mt.train_tokenizer(TEXTS, 290), TINY)
    randomize(lm.model)
    lm.save(path / "model")
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return mt.load(folder)


@pytest.fixture(scope="module")
def plain(lm):
    shape = TINY.model_copy(update={"meta_attention_layers": "none"})
    return mt.LanguageModel.from_scratch(lm.tokenizer, shape)


@pytest.fixture(scope="module")
def gpt2(lm):
    """A model of transformers as it comes, with a tokenizer that knows a meta-token it lacks."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    return mt.LanguageModel(model, lm.tokenizer)


def test_a_string_gets_meta_tokens_and_keeps_its_text(lm):
    ids = lm.inject(TEXTS[0], mt.UniformInjection(0.3), seed=3)
    text_ids = TextEncoder(mt.load_text_tokenizer(lm.model.name_or_path)).encode_batch([TEXTS[0]])[0].tolist()
    expected = mt.inject_into_prompt(
        text_ids, mt.UniformInjection(0.3), meta_token_id=lm.tokenizer.meta_token_id, seed=3
    )
    assert ids.tolist() == [expected]
    assert lm.tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]


def test_a_saved_model_states_where_its_meta_tokens_stand(lm, tmp_path):
    new = mt.LanguageModel.from_scratch(lm.tokenizer, TINY)
    new.injection = mt.PeriodicInjection(0.25)
    new.save(tmp_path / "periodic")
    again = mt.load(tmp_path / "periodic")
    stated = again.model.generation_config.meta_schedule
    assert stated == {"kind": "periodic", "text_tokens": 3}
    again.injection = mt.UniformInjection(0.1)
    again.save(tmp_path / "again")  # what a model states stays
    assert mt.load(tmp_path / "again").model.generation_config.meta_schedule == stated


def test_saving_changes_nothing_and_states_no_guess(lm, tmp_path):
    new = mt.LanguageModel.from_scratch(lm.tokenizer, TINY)
    new.save(tmp_path / "guessed")
    assert getattr(mt.load(tmp_path / "guessed").model.generation_config, "meta_schedule", None) is None
    new.injection = mt.PeriodicInjection(0.1)
    new.save(tmp_path / "rare")
    new.injection = mt.PeriodicInjection(0.5)
    assert without_time(new.generate(TEXTS[1], **WHOLE)) == without_time(new.generate(TEXTS[1], every=1, **WHOLE))
    new.save(tmp_path / "dense")
    assert mt.load(tmp_path / "dense").model.generation_config.meta_schedule["text_tokens"] == 1


@pytest.mark.parametrize("form", ["transformers", "text tokenizer", "run", "folder", "name"])
def test_every_form_of_a_tokenizer_gives_the_same_ids_and_the_same_text(lm, folder, form):
    tokenizer = {
        "transformers": AutoTokenizer.from_pretrained(folder / "model"),
        "text tokenizer": mt.load_text_tokenizer(str(folder)),
        "run": folder,
        "folder": folder / "model",
        "name": str(folder),
    }[form]
    other = mt.LanguageModel(lm.model, tokenizer)
    assert torch.equal(other.inject(TEXTS[0]), lm.inject(TEXTS[0]))
    assert other.tokenizer.meta_token_id == lm.model.config.meta_token_id
    by_hand = mt.generate_text(lm.model, tokenizer, TEXTS[0], schedule=mt.PeriodicSchedule(4), **WHOLE)
    assert lm.generate(TEXTS[0], every=4, **WHOLE).text == by_hand.text


def without_time(generated):
    return replace(generated, seconds=0)


def test_generation_puts_meta_tokens_where_training_had_them(lm):
    unsaid = without_time(lm.generate(TEXTS[1], **WHOLE))
    assert unsaid == without_time(lm.generate(TEXTS[1], schedule=mt.UniformSchedule(0.1), **WHOLE))
    dense = mt.LanguageModel(lm.model, lm.tokenizer, injection=mt.PeriodicInjection(0.5))
    assert without_time(dense.generate(TEXTS[1], **WHOLE)) == without_time(lm.generate(TEXTS[1], every=1, **WHOLE))


def test_generation_follows_the_schedule_that_the_model_states(lm, monkeypatch):
    monkeypatch.setattr(
        lm.model.generation_config, "meta_schedule", {"kind": "periodic", "text_tokens": 3}, raising=False
    )
    stated = without_time(lm.generate(TEXTS[1], **WHOLE))
    assert stated == without_time(lm.generate(TEXTS[1], every=3, **WHOLE))


def test_generation_without_a_length_ends_with_the_window(lm):
    result = lm.generate(TEXTS[0], every=4, temperature=0)
    prompt = len(TextEncoder(lm.tokenizer).encode_batch([TEXTS[0]])[0])
    assert 64 - 5 <= (prompt + result.text_tokens) * 5 / 4 <= 64 + 1


@pytest.mark.parametrize(
    "texts", [TEXTS, iter(TEXTS), [("text 1", TEXTS[0]), ("text 2", TEXTS[1])]], ids=["list", "iterator", "pairs"]
)
def test_perplexity_is_that_of_the_function_in_the_whole_window_and_as_trained(lm, folder, texts):
    options = mt.PerplexityOptions(window=64, window_unit="positions", injection=mt.UniformInjection())
    documents = [("text 1", TEXTS[0]), ("text 2", TEXTS[1])]
    assert lm.perplexity(texts) == mt.measure_perplexity(lm.model, documents, folder, options)


def test_a_path_is_read_as_a_source(lm, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    assert lm.perplexity(tmp_path).nats_per_token == lm.perplexity(TEXTS).nats_per_token


def test_recall_is_that_of_the_function_on_the_trained_task(lm):
    trained = EvaluateConfig(task=mt.ParityTask(), size=(2, 3), lengths=("1-32",), instances=3, seed=5)
    own = mt.LanguageModel(lm.model, lm.tokenizer, evaluation=trained)
    expected = mt.evaluate_recall([lm.model], trained, PieceEncoder(TextEncoder(lm.tokenizer)))
    assert own.recall() == own.recall("parity") == expected
    (other,) = own.recall("copying", size=(1, 1), instances=2)
    assert (other.task, other.length, other.instances) == ("copying", "1-32", 2)
    assert other.token_accuracy is not None


def test_an_intervention_holds_within_its_block_however_it_is_named(lm):
    ids = lm.inject(TEXTS[0])
    with torch.no_grad():
        before = lm.model(ids).logits
        with lm.intervene(mt.ZeroEmbedding()):
            zeroed = lm.model(ids).logits
        with lm.intervene("zero_embedding") as same, mt.intervene(lm.model, ()):
            assert torch.equal(same.model(ids).logits, zeroed)
        with mt.intervene(lm.model, mt.ZeroEmbedding()):
            assert torch.equal(lm.model(ids).logits, zeroed)
        assert not torch.equal(zeroed, before)
        assert torch.equal(lm.model(ids).logits, before)


def test_attention_has_the_weights_of_both_branches_at_the_tokens_that_have_them(folder):
    lm = mt.load(folder)
    lm.model.double()
    ids = lm.inject(TEXTS[0], mt.UniformInjection(0.3))
    attention = lm.attention(ids)
    meta = attention.is_meta.nonzero()[:, 0]
    assert len(meta) > 2
    assert attention.tokens[int(meta[0])] == "_PAUSE_"
    torch.testing.assert_close(attention.self_attention.sum(-1), torch.ones(2, 2, ids.shape[1], dtype=torch.float64))
    per_query = attention.meta_attention.sum(-1)
    torch.testing.assert_close(per_query, attention.is_meta.double().expand_as(per_query))
    assert not attention.meta_attention[..., ~attention.is_meta].any()
    with lm.lens().capture(
        [f"blocks.1.{branch}.hook_{tap}" for branch in ("attn", "meta_attn") for tap in "vz"]
    ) as seen:
        lm.lens().run(ids)
    own = attention.self_attention[1] @ seen["blocks.1.attn.hook_v"][0].transpose(0, 1)
    packed = attention.meta_attention[1][:, meta][:, :, meta]
    among = packed @ seen["blocks.1.meta_attn.hook_v"][0].transpose(0, 1)
    torch.testing.assert_close(own.transpose(0, 1), seen["blocks.1.attn.hook_z"][0])
    torch.testing.assert_close(among.transpose(0, 1), seen["blocks.1.meta_attn.hook_z"][0])


def test_a_plot_has_a_bar_for_each_token_that_the_query_sees(lm):
    attention = lm.attention(lm.inject(TEXTS[0], mt.UniformInjection(0.3)))
    query = int(attention.is_meta.nonzero()[-1])
    self_panel, meta_panel = attention.plot(query, layer=1).axes
    for panel, weights in ((self_panel, attention.self_attention), (meta_panel, attention.meta_attention)):
        bars = torch.tensor([bar.get_height() for bar in panel.patches], dtype=torch.float64)
        torch.testing.assert_close(bars, weights[1, :, query, : query + 1].double().mean(0))
    first_text = int((~attention.is_meta).nonzero()[0])
    assert len(attention.plot(first_text, head=0).axes) == 1


def test_what_a_method_needs_does_not_depend_on_the_mode_of_the_model(folder):
    lm = mt.load(folder)
    before = lm.attention(TEXTS[0]).self_attention
    lm.model.train()
    assert torch.equal(lm.attention(TEXTS[0]).self_attention, before)
    assert lm.recall("parity", instances=1)
    assert lm.model.training


@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_a_model_without_meta_attention_works_without_meta_tokens(name, request):
    lm = request.getfixturevalue(name)
    assert lm.tokenizer.decode(lm.inject(TEXTS[0])[0]) == TEXTS[0]
    assert lm.generate(TEXTS[0], **WHOLE).meta_tokens == 0
    assert lm.perplexity(TEXTS).injection == {"kind": "none"}
    attention = lm.attention(TEXTS[0])
    assert not attention.is_meta.any()
    assert not attention.meta_attention.any()
    assert len(attention.plot().axes) == 1


MISUSE = {
    "load a number": lambda _: mt.load(3),
    "no such task": lambda lm: lm.recall("coping"),
    "no task": lambda lm: lm.recall(),
    "a task of its number": lambda lm: lm.recall(3),
    "a model that is none": lambda lm: mt.LanguageModel("demo/meta", lm.tokenizer),
    "prompt of ids": lambda lm: lm.generate([1, 2]),
    "period of 0": lambda lm: lm.generate("owl", every=0),
    "two schedules": lambda lm: lm.generate("owl", every=3, schedule=mt.NoSchedule()),
    "a ratio for a schedule": lambda lm: lm.generate("owl", schedule=0.1),
    "a ratio for an injection": lambda lm: lm.inject("owl", 0.1),
    "a document of ids": lambda lm: lm.perplexity([[1, 2]]),
    "a long window": lambda lm: lm.perplexity("owl", window=1000),
    "an unknown intervention": lambda lm: lm.intervene("zero_embeding").__enter__(),
    "an intervention that is a class": lambda lm: mt.intervene(lm.model, mt.ZeroEmbedding).__enter__(),
    "a text of strings": lambda lm: lm.inject(["owl"]),
    "a text that is a number": lambda lm: lm.attention(3),
    "no text": lambda lm: lm.attention(""),
    "a long text": lambda lm: lm.attention(64 * "owl "),
    "an id outside": lambda lm: lm.attention([10_000]),
    "a tokenizer that is none": lambda lm: mt.LanguageModel(lm.model, 3).generate("owl"),
    "a ratio of 2": lambda _: mt.UniformInjection(2.0),
    "two ratios": lambda _: mt.UniformInjection(0.2, 0.3),
    "a ratio twice": lambda _: mt.UniformInjection(0.2, ratio=0.3),
    "an unknown field": lambda _: mt.UniformInjection(rate=0.3),
    "a missing field": lambda _: mt.TokenEmbedding(),
    "a collator without ids": lambda _: mt.MetaTokenCollator(mt.UniformInjection()),
    "a row of a string without a tokenizer": lambda _: mt.MetaTokenCollator(
        mt.UniformInjection(), meta_token_id=8, pad_token_id=9
    )(["owl"]),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_in_one_sentence(lm, misuse):
    with pytest.raises((ValueError, TypeError)) as caught:
        MISUSE[misuse](lm)
    assert re.fullmatch(r"[^\n]{10,300}", str(caught.value))


@pytest.mark.parametrize(
    ("use", "lacks"),
    [
        (lambda lm: lm.inject("owl", mt.UniformInjection()), "a model with a meta-token"),
        (lambda lm: lm.recall("parity"), "metatokens.load"),
        (lambda lm: lm.generate("owl", every=2), "a model with a meta-token"),
        (lambda lm: lm.intervene(mt.ZeroEmbedding()).__enter__(), "a model of this package"),
    ],
    ids=["inject", "recall", "generate", "intervene"],
)
def test_a_model_without_a_meta_token_says_what_it_lacks(gpt2, use, lacks):
    with pytest.raises(ValueError, match=lacks):
        use(gpt2)


def test_variants_take_their_fields_by_position():
    assert mt.UniformInjection(0.2) == mt.UniformInjection(ratio=0.2)
    assert mt.UniformSchedule(0.2, 3) == mt.UniformSchedule(ratio=0.2, seed=3)
    assert mt.PeriodicSchedule(4) == mt.PeriodicSchedule(text_tokens=4)
    assert mt.NoMetaAttention((0,)) == mt.NoMetaAttention(layers=(0,))


def test_a_collator_with_a_tokenizer_takes_strings_as_it_takes_their_ids(lm):
    rows = [{"input_ids": ids} for ids in TextEncoder(lm.tokenizer).encode_batch(TEXTS)]
    ids = {name: getattr(lm.tokenizer, name) for name in ("meta_token_id", "pad_token_id")}
    expected = mt.MetaTokenCollator(mt.UniformInjection(0.2), **ids)(rows)
    collate = mt.MetaTokenCollator(mt.UniformInjection(0.2), lm.tokenizer)
    (batch,) = DataLoader(TEXTS, batch_size=2, collate_fn=collate)
    assert (batch["input_ids"] == ids["meta_token_id"]).any(1).all()
    torch.testing.assert_close(dict(batch), expected)


def test_every_public_name_is_there():
    assert {name for name in mt.__all__ if getattr(mt, name, None) is None} == set()


def test_the_config_documents_every_field():
    inherited = {field.name for field in fields(mt.MetaTokenConfig.__mro__[1])}
    own = {name for name in mt.MetaTokenConfig.__annotations__ if not name.startswith(("model_", "keys_", "base_"))}
    assert own - inherited
    documented = set(re.findall(r"^ {4,8}(\w+): [A-Z\"]", str(mt.MetaTokenConfig.__doc__), re.MULTILINE))
    assert documented == own
