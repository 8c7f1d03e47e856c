import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from metatokens.config.schema import (
    ExplicitInjection,
    NoInjection,
    PeriodicInjection,
    PunctuationInjection,
    ThoughtInjection,
    UniformInjection,
)
from metatokens.data.special_tokens import META_TOKEN
from metatokens.data.tokenizer import TextEncoder, train_tokenizer
from metatokens.errors import UsageError
from metatokens.generation.decoding import (
    MetaTokenSchedule,
    NoSchedule,
    PeriodicSchedule,
    ThoughtSchedule,
    UniformSchedule,
    generate_text,
    generate_texts,
    schedule_for,
    schedule_meta_tokens,
)
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM

TEXT = "the owl sat, and the owl saw: a mouse; naïve café owls — где мышь? 🦉🦉 run!"
SCHEDULES = [
    NoSchedule(),
    PeriodicSchedule(text_tokens=3),
    UniformSchedule(ratio=0.4, seed=5),
    ThoughtSchedule(text_tokens=4, num_tokens=3),
]


def by_kind(schedule):
    return schedule.kind


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 290)


def make_model(tokenizer, **changes):
    num_text = TextEncoder(tokenizer).vocab_size
    fields = {
        "vocab_size": num_text + 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,  # tied random weights repeat the last token for ever
        "meta_token_id": num_text,
        "pad_token_id": num_text + 1,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(1)
    return MetaTokenForCausalLM(MetaTokenConfig(**(fields | changes))).double().eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def meta(model):
    return model.config.meta_token_id


def layout(schedule, num_positions):
    """Return where a sequence of so many positions has meta-tokens, position by position."""
    positions, num_text = [], 0
    for position in range(num_positions):
        if schedule.is_due(num_text, len(positions), positions[-1:] == [position - 1]):
            positions.append(position)
        else:
            num_text += 1
    return positions


def generate(model, ids, schedule, mask=None, **options):
    pad = model.config.pad_token_id
    ids = torch.tensor(ids)
    processor = MetaTokenSchedule(schedule, meta_token_id=model.config.meta_token_id, pad_token_id=pad)
    options = {"do_sample": False, "max_new_tokens": 20} | options
    return model.generate(
        input_ids=ids,
        attention_mask=(ids != pad).long() if mask is None else mask,
        logits_processor=LogitsProcessorList([processor]),
        pad_token_id=pad,
        **options,
    )


def where(row, meta):
    return (row == meta).nonzero()[:, 0].tolist()


# schedules


def test_periodic_schedule_puts_a_meta_after_every_third_text_token():
    assert layout(PeriodicSchedule(text_tokens=3), 16) == [3, 7, 11, 15]


def test_thought_schedule_puts_a_run_after_every_fourth_text_token():
    assert layout(ThoughtSchedule(text_tokens=4, num_tokens=3), 16) == [4, 5, 6, 11, 12, 13]
    assert layout(ThoughtSchedule(text_tokens=2, num_tokens=1), 9) == layout(PeriodicSchedule(text_tokens=2), 9)


def test_uniform_schedule_has_its_ratio_and_no_period():
    positions = np.array(layout(UniformSchedule(ratio=0.2, seed=0), 5000))
    assert 0.18 < len(positions) / 5000 < 0.22
    gaps = np.bincount(np.diff(positions))
    # geometric gaps: a fifth of the metas follow a meta at once, and no gap takes over
    assert 0.16 < gaps[1] / gaps.sum() < 0.24
    assert gaps.argmax() in (1, 2)


def test_uniform_schedule_has_another_layout_for_another_seed():
    layouts = {tuple(layout(UniformSchedule(ratio=0.2, seed=seed), 200)) for seed in range(20)}
    assert len(layouts) == 20


def test_uniform_schedule_has_a_draw_of_its_own_for_every_position():
    draws = layout(UniformSchedule(ratio=0.5, seed=0), 400)
    halves = {p for p in draws if p < 200}, {p - 200 for p in draws if p >= 200}
    assert halves[0] != halves[1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
def test_prompt_gets_the_layout_that_its_positions_have(schedule):
    prompt = schedule_meta_tokens(list(range(1, 30)), schedule, meta_token_id=99)
    assert [token for token in prompt if token != 99] == list(range(1, 30))
    assert [i for i, token in enumerate(prompt) if token == 99] == layout(schedule, len(prompt))


@pytest.mark.parametrize(
    ("injection", "schedule"),
    [
        (NoInjection(), NoSchedule()),
        (UniformInjection(ratio=0.2), UniformSchedule(0.2)),
        (PunctuationInjection(ratio=0.2), UniformSchedule(0.2)),
        (PeriodicInjection(ratio=0.2), PeriodicSchedule(4)),
        (PeriodicInjection(ratio=0), NoSchedule()),
        (ThoughtInjection(ratio=0.2, length=3), ThoughtSchedule(text_tokens=20, num_tokens=5)),
        (ThoughtInjection(ratio=0, length=3), NoSchedule()),
        (ExplicitInjection(positions=(3, 7)), None),
    ],
)
def test_schedule_of_a_trained_model_is_that_of_its_injection(injection, schedule):
    assert schedule_for(injection) == schedule


# under model.generate


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 3, "num_return_sequences": 3},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "top k", "top p", "beams", "static cache"],
)
def test_generate_has_metas_exactly_on_schedule(model, meta, schedule, options):
    prompt = schedule_meta_tokens([5, 6, 7, 8, 9], schedule, meta_token_id=meta)
    for row in generate(model, [prompt], schedule, **options):
        assert len(row) == len(prompt) + 20
        assert where(row, meta) == layout(schedule, len(row))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
def test_cached_tokens_are_the_greedy_choice_of_an_uncached_forward(model, meta, schedule):
    prompt = schedule_meta_tokens([5, 6, 7, 8, 9], schedule, meta_token_id=meta)
    row = generate(model, [prompt], schedule, max_new_tokens=30)[0]
    with torch.no_grad():
        choices = model(row[None]).logits[0, :, :meta].argmax(-1)
    assert len(set(choices.tolist())) > 5
    for i in range(len(prompt), len(row)):
        if row[i] != meta:
            assert row[i] == choices[i - 1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
def test_left_padded_rows_generate_what_each_does_alone(model, meta, schedule):
    pad = model.config.pad_token_id
    prompts = [schedule_meta_tokens(range(5, 5 + n), schedule, meta_token_id=meta) for n in (2, 9, 13)]
    longest = max(map(len, prompts))
    rows = generate(model, [[pad] * (longest - len(p)) + p for p in prompts], schedule)
    for prompt, row in zip(prompts, rows, strict=True):
        alone = generate(model, [prompt], schedule)[0]
        assert row[longest - len(prompt) :].tolist() == alone.tolist()


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_ragged_rows_share_the_meta_columns_of_the_cache(tokenizer, meta, encoding):
    model = make_model(tokenizer, position_encoding=encoding).double()
    schedule = PeriodicSchedule(text_tokens=3)
    pad = model.config.pad_token_id
    prompts = [list(range(5, 5 + n)) for n in (1, 2, 3, 4)]  # each row has its meta-tokens at another step
    padded = [[pad] * (4 - len(p)) + p for p in prompts]
    output = generate(model, padded, schedule, max_new_tokens=60, return_dict_in_generate=True)
    most = int((output.sequences == meta).sum(1).max())
    assert most > 12
    assert output.past_key_values.layers[0].num_meta < most + 16  # and not four times as many
    for prompt, row in zip(prompts, output.sequences, strict=True):
        alone = generate(model, [prompt], schedule, max_new_tokens=60)[0]
        assert row[4 - len(prompt) :].tolist() == alone.tolist()
    uncached = generate(model, padded, schedule, max_new_tokens=60, use_cache=False)
    assert torch.equal(uncached, output.sequences)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
def test_generation_in_two_parts_equals_one(model, schedule):
    whole = generate(model, [[5, 6, 7, 8]], schedule, max_new_tokens=24)
    part = generate(model, [[5, 6, 7, 8]], schedule, max_new_tokens=11)
    assert generate(model, part.tolist(), schedule, max_new_tokens=13).tolist() == whole.tolist()


def test_beam_pays_nothing_for_a_forced_meta(model, meta):
    schedule = PeriodicSchedule(text_tokens=2)
    output = generate(
        model,
        [[5, 6, 7]],
        schedule,
        num_beams=3,
        max_new_tokens=10,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    row = output.sequences[0]
    with torch.no_grad():
        logits = model(row[None]).logits[0, :-1]
    paid = [float(logits[i - 1].log_softmax(-1)[row[i]]) for i in range(3, len(row)) if row[i] != meta]
    assert float(output.sequences_scores[0]) == pytest.approx(sum(paid), abs=1e-4)


def test_schedule_keeps_the_scores_of_text_tokens_off_schedule():
    processor = MetaTokenSchedule(PeriodicSchedule(text_tokens=2), meta_token_id=3, pad_token_id=4)
    scores = torch.arange(10.0).view(2, 5)
    result = processor(torch.tensor([[4, 4, 1], [4, 1, 2]]), scores)
    lowest = -torch.inf
    assert result.tolist() == [[0, 1, 2, lowest, 4], [lowest, lowest, lowest, 0, lowest]]
    assert scores.tolist() == torch.arange(10.0).view(2, 5).tolist()


def test_schedule_goes_on_after_embeddings_that_come_with_their_ids(model, meta):
    schedule = PeriodicSchedule(text_tokens=3)
    prompt = torch.tensor([schedule_meta_tokens([5, 6, 7, 8, 9], schedule, meta_token_id=meta)])
    processors = LogitsProcessorList([MetaTokenSchedule(schedule, meta_token_id=meta)])
    embeds = {"inputs_embeds": model.get_input_embeddings()(prompt), "meta_token_mask": prompt == meta}
    options = {"attention_mask": torch.ones_like(prompt), "logits_processor": processors, "max_new_tokens": 12}
    row = model.generate(prompt, **embeds, **options, do_sample=False)[0]
    assert row.tolist() == generate(model, prompt.tolist(), schedule, max_new_tokens=12)[0].tolist()
    assert where(row, meta) == layout(schedule, len(row))
    with pytest.raises(ValueError, match="give generate input_ids beside inputs_embeds"):
        model.generate(**embeds, **options, do_sample=False)


# generate_text


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=by_kind)
def test_text_has_the_tokens_asked_for_and_the_metas_of_its_schedule(model, tokenizer, schedule, temperature):
    result = generate_text(model, tokenizer, "the owl", schedule=schedule, max_text_tokens=31, temperature=temperature)
    encoded = schedule_meta_tokens(
        TextEncoder(tokenizer).encode_batch(["the owl"])[0].tolist(), schedule, meta_token_id=-1
    )
    total = len(encoded) + result.text_tokens + result.meta_tokens
    assert (result.text_tokens, result.stopped_by) == (31, "length")
    assert result.meta_tokens == len([p for p in layout(schedule, total) if p >= len(encoded)])
    assert result.seconds > 0


def test_pieces_of_the_stream_add_up_to_the_text(model, tokenizer):
    pieces = []
    result = generate_text(
        model,
        tokenizer,
        "owl",
        schedule=PeriodicSchedule(text_tokens=4),
        max_text_tokens=60,
        seed=2,
        stream=pieces.append,
    )
    assert "".join(pieces) == result.text
    assert len(pieces) > 20
    assert META_TOKEN not in result.text


def test_prompts_of_any_lengths_are_continued_together_as_each_alone(model, tokenizer):
    prompts = ["the owl sat, and", "", "где мышь?", "owls"]
    options = {"schedule": SCHEDULES[1], "max_text_tokens": 12, "seed": 3, "show_meta": True}
    pieces = [[] for _ in prompts]
    together = generate_texts(
        model, tokenizer, prompts, stream=lambda index, piece: pieces[index].append(piece), **options
    )
    alone = [generate_text(model, tokenizer, prompt, **options) for prompt in prompts]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [(one.text_tokens, one.meta_tokens) for one in together] == [
        (one.text_tokens, one.meta_tokens) for one in alone
    ]
    assert ["".join(of_one) for of_one in pieces] == [one.text for one in together]
    assert generate_texts(model, tokenizer, [], **options) == []


def test_metas_are_shown_where_they_stand_when_asked_for(model, tokenizer):
    options = {"schedule": PeriodicSchedule(text_tokens=4), "max_text_tokens": 40, "seed": 2}
    hidden = generate_text(model, tokenizer, "owl", **options)
    shown = generate_text(model, tokenizer, "owl", show_meta=True, **options)
    assert shown.text.count(META_TOKEN) == shown.meta_tokens == hidden.meta_tokens > 5
    assert shown.text.replace(META_TOKEN, "") == hidden.text


def scripted_model(tokenizer, ids):
    """Return a real model whose greedy continuation of any one-token prompt is `ids`: position alone decides."""
    model = make_model(tokenizer, position_encoding="learned", hidden_size=32, meta_attention_layers="none")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        # orthogonal codes of the positions, and a head that reads the next id off them
        codes = torch.linalg.qr(torch.randn(32, 32))[0]
        codes = torch.nn.functional.layer_norm(codes, (32,))
        model.model.embed_positions.weight[:32] = codes
        for position, token in enumerate(ids):
            model.lm_head.weight[token] += 10 * codes[position]
    return model


def test_stream_holds_back_a_character_until_its_bytes_are_complete(tokenizer):
    ids = TextEncoder(tokenizer).encode_batch(["ﬂ漢"])[0].tolist()  # bytes alone: the tokenizer never saw them
    assert len(ids) == 6
    pieces = []
    result = generate_text(
        scripted_model(tokenizer, ids),
        tokenizer,
        "",
        schedule=NoSchedule(),
        max_text_tokens=6,
        temperature=0,
        stream=pieces.append,
    )
    assert pieces == ["ﬂ", "漢"]
    assert result.text == "ﬂ漢"


def test_stream_ends_with_the_bytes_that_never_became_a_character(tokenizer):
    ids = TextEncoder(tokenizer).encode_batch(["a漢"])[0].tolist()
    result = generate_text(
        scripted_model(tokenizer, ids), tokenizer, "", schedule=NoSchedule(), max_text_tokens=3, temperature=0
    )
    assert result.text == tokenizer.decode(ids[:3]) == "a\ufffd"


def sentencepiece_like():
    """Return a Llama-like tokenizer: a space is the mark before a word, and a text loses its first one."""
    pieces = ["</s>", "<unk>", *dict.fromkeys("▁onceuptimask"), "▁a", "▁as", "▁ask"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("▁", "a"), ("▁a", "s"), ("▁as", "k")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer, ids["▁ask"]


@pytest.mark.parametrize(("prompt", "text"), [("once upon a time", " ask ask"), ("once", " ask ask"), ("", "ask ask")])
def test_first_space_is_kept_after_a_prompt_by_a_tokenizer_that_marks_words(prompt, text):
    tokenizer, ask = sentencepiece_like()
    num_text = tokenizer.get_vocab_size()
    model = make_model(tokenizer)
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[ask] = 10
    pieces = []
    result = generate_text(
        model, tokenizer, prompt, schedule=NoSchedule(), max_text_tokens=2, temperature=0, stream=pieces.append
    )
    assert num_text == model.config.meta_token_id
    assert result.text == "".join(pieces) == text
    assert result.text_tokens == 2


def test_row_of_a_padded_vocabulary_that_the_tokenizer_does_not_own_is_never_generated(tokenizer):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.model.norm.bias.fill_(1)
        model.lm_head.weight[TextEncoder(tokenizer).vocab_size :] = 10
        model.lm_head.weight[65] = 9
    result = generate_text(model, tokenizer, "owl", schedule=NoSchedule(), max_text_tokens=5, temperature=0)
    assert result.text == tokenizer.decode([65] * 5)


@pytest.mark.parametrize("schedule", [PeriodicSchedule(text_tokens=50), UniformSchedule(ratio=1e-9)], ids=by_kind)
def test_schedule_that_puts_nothing_into_a_short_text_warns(model, tokenizer, schedule):
    with pytest.warns(UserWarning, match=f"schedule {schedule.kind} puts no meta-token into this prompt and 3 text"):
        assert generate_text(model, tokenizer, "owl", schedule=schedule, max_text_tokens=3).meta_tokens == 0


def test_schedule_of_ratio_zero_warns_of_nothing(model, tokenizer):
    schedule = UniformSchedule(ratio=0)
    assert generate_text(model, tokenizer, "owl", schedule=schedule, max_text_tokens=3).meta_tokens == 0


def test_end_of_text_stops_and_is_not_shown(tokenizer):
    encoder = TextEncoder(tokenizer)
    ids = [*encoder.encode_batch(["owl"])[0].tolist(), encoder.eos_token_id]
    result = generate_text(
        scripted_model(tokenizer, ids), tokenizer, "", schedule=NoSchedule(), max_text_tokens=20, temperature=0
    )
    assert (result.text, result.text_tokens, result.stopped_by) == ("owl", len(ids) - 1, "end_of_text")


def test_same_seed_gives_the_same_text_and_another_seed_another(model, tokenizer):
    def text(seed):
        return generate_text(
            model, tokenizer, "owl", schedule=SCHEDULES[2], max_text_tokens=30, top_k=50, top_p=0.99, seed=seed
        ).text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_temperature_zero_is_greedy_whatever_the_seed(model, tokenizer):
    texts = {
        generate_text(model, tokenizer, "owl", schedule=SCHEDULES[1], max_text_tokens=20, temperature=0, seed=seed).text
        for seed in range(3)
    }
    assert len(texts) == 1


def test_random_state_and_mode_of_the_caller_stay(tokenizer):
    model = make_model(tokenizer, hidden_dropout=0.5).train()
    before = torch.random.get_rng_state()
    text = generate_text(model, tokenizer, "owl", schedule=NoSchedule(), max_text_tokens=9).text
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    # without the dropout of its mode
    assert generate_text(model.eval(), tokenizer, "owl", schedule=NoSchedule(), max_text_tokens=9).text == text


def test_prompt_that_spells_special_tokens_is_plain_text(model, tokenizer, meta):
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    generate_text(model, tokenizer, "_PAUSE_<|endoftext|>", schedule=NoSchedule(), max_text_tokens=1)
    handle.remove()
    assert not set(seen[0].flatten().tolist()) & {0, meta}


def test_plain_model_of_transformers_generates_without_a_schedule(tokenizer):
    torch.manual_seed(0)
    vocab_size = TextEncoder(tokenizer).vocab_size
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    result = generate_text(GPT2LMHeadModel(config), tokenizer, "owl", schedule=NoSchedule(), max_text_tokens=7)
    assert result.meta_tokens == 0
    assert result.text


def test_schedule_for_a_model_without_a_meta_token_is_a_usage_error(tokenizer):
    model = make_model(tokenizer, meta_token_id=None, meta_attention_layers="none")
    with pytest.raises(UsageError, match="meta_token_id None"):
        generate_text(model, tokenizer, "owl", schedule=SCHEDULES[1], max_text_tokens=3)


@pytest.mark.parametrize("schedule", [NoSchedule(), PeriodicSchedule(text_tokens=1)], ids=by_kind)
def test_longest_sequence_that_fits_is_generated_and_one_more_token_is_a_usage_error(model, tokenizer, schedule):
    # an empty prompt is one end of text
    fits = 127 if schedule.kind == "none" else 63
    result = generate_text(model, tokenizer, "", schedule=schedule, max_text_tokens=fits)
    assert result.text_tokens == fits
    with pytest.raises(UsageError, match=rf"at most 128 positions .* prompt of 1 and {fits + 1} text tokens"):
        generate_text(model, tokenizer, "", schedule=schedule, max_text_tokens=fits + 1)


def test_tokenizer_of_another_model_is_a_usage_error(model):
    with pytest.raises(UsageError, match="found 260"):
        generate_text(model, train_tokenizer([TEXT], 260), "owl", schedule=NoSchedule(), max_text_tokens=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_text_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_sampling_number_out_of_range_is_a_usage_error_that_names_it(model, tokenizer, field, value):
    with pytest.raises(UsageError, match=field):
        generate_text(model, tokenizer, "owl", schedule=NoSchedule(), **({"max_text_tokens": 3} | {field: value}))
