import json
import math
from dataclasses import asdict, replace
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import GPT2Config, GPT2LMHeadModel

from grafted_models import CONFIG, trained
from metatokens.config.schema import (
    ExplicitInjection,
    NoInjection,
    PeriodicInjection,
    PunctuationInjection,
    UniformInjection,
)
from metatokens.data.injection import sample_meta_positions
from metatokens.data.tokenizer import (
    TextEncoder,
    build_hf_tokenizer,
    ends_clause_table,
    load_text_tokenizer,
    train_tokenizer,
)
from metatokens.errors import DataError, NumericError, UsageError
from metatokens.evaluation.interventions import (
    MeanEmbedding,
    NoMetaAttention,
    NoPositionEdges,
    TokenEmbedding,
    ZeroEmbedding,
    ZeroPosition,
    intervene,
)
from metatokens.evaluation.perplexity import PerplexityResult, measure_perplexity
from metatokens.evaluation.scoring import TokenScorer, token_losses
from metatokens.evaluation.windows import PerplexityOptions, Window, lay_windows
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM

LONG = "the owl sat, and the owl saw: a mouse; the mouse ran! where did it run? into the night, owl."
SHORT = "a small owl, unseen."
DOCUMENTS = [("long", LONG), ("short", SHORT)]
INJECTIONS = [
    NoInjection(),
    UniformInjection(ratio=0.3),
    PeriodicInjection(ratio=0.3),
    PunctuationInjection(ratio=0.3),
    ExplicitInjection(positions=(0, 4, 5, 9)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([LONG, SHORT, LONG], 290)


def make_model(tokenizer, **changes):
    # weights far larger than usual, so that every token of the context shows in the loss
    num_text = TextEncoder(tokenizer).vocab_size
    fields = {
        "vocab_size": num_text + 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "meta_token_id": num_text,
        "pad_token_id": num_text + 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return MetaTokenForCausalLM(MetaTokenConfig(**(fields | changes))).double().eval()


@pytest.fixture(scope="module", params=["skip", "retarget"])
def model(request, tokenizer):
    return make_model(tokenizer, loss_policy=request.param)


@pytest.fixture(scope="module")
def skip_model(tokenizer):
    return make_model(tokenizer)


@torch.no_grad()
def losses_by_own_forward_passes(model, tokenizer, text, *, window, stride, injection, seed, document, positions=None):
    """Score one token after another, each by a forward pass over the very input that predicts it."""
    encoder = TextEncoder(tokenizer)
    sequence = [encoder.eos_token_id, *encoder.encode_batch([text])[0].tolist()]
    num_tokens, scored, losses = len(sequence) - 1, 0, []
    for number in count():
        start, end = number * stride, min(number * stride + window, num_tokens)
        inside = sequence[start:end]
        if injection.kind == "explicit":
            metas = [p for j, p in enumerate(injection.positions) if p <= len(inside) + j]
        else:
            num_meta = next(m for m in count() if injection.num_meta(len(inside) + m) == m)
            if positions is not None and len(inside) == window:
                num_meta = positions - window
            metas = sample_meta_positions(
                injection,
                sample_ids=np.array([number]),
                block_size=len(inside) + num_meta,
                seed=seed,
                epoch=document,
                text=np.array([inside]),
                ends_clause=ends_clause_table(tokenizer),
            )[0].tolist()
        row, columns = [], []
        for token in inside:
            while len(row) in metas:
                row.append(model.config.meta_token_id)
            columns.append(len(row))
            row.append(token)
        while len(row) in metas:
            row.append(model.config.meta_token_id)
        columns.append(len(row))
        for target in range(scored - start, end - start):
            last = columns[target] if model.config.loss_policy == "retarget" else columns[target + 1] - 1
            logits = model(torch.tensor([row[: last + 1]])).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[sequence[start + target + 1]]))
        scored = end
        if end == num_tokens:
            return losses


@pytest.mark.parametrize("unit", ["text", "positions"])
@pytest.mark.parametrize("injection", INJECTIONS, ids=lambda injection: injection.kind)
def test_each_token_has_the_loss_of_its_own_forward_pass(model, tokenizer, injection, unit):
    options = PerplexityOptions(window=13, window_unit=unit, injection=injection, seed=7, stride=4, batch_size=3)
    scorer = TokenScorer(model, tokenizer, options)
    window = scorer.text_tokens_per_window
    for document, (_, text) in enumerate(DOCUMENTS):
        tokens = scorer.encoder.encode_batch([text])[0]
        for stride in (window, 4):
            expected = losses_by_own_forward_passes(
                model,
                tokenizer,
                text,
                window=window,
                stride=stride,
                injection=injection,
                seed=7,
                document=document,
                positions=scorer.positions_per_window if unit == "positions" else None,
            )
            losses = scorer.score(tokens, document_number=document, stride=stride)
            np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


def test_windows_are_those_drawn_in_the_module_docstring():
    assert lay_windows(7, window=4, stride=4) == [Window(0, 0, 4, 4), Window(1, 4, 3, 3)]
    assert lay_windows(7, window=4, stride=2) == [Window(0, 0, 4, 4), Window(1, 2, 4, 2), Window(2, 4, 3, 1)]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_windows_score_every_token_once_with_the_promised_context(num_tokens, window, stride):
    stride = min(stride, window)
    scored = []
    for number, w in enumerate(lay_windows(num_tokens, window=window, stride=stride)):
        assert w.number == number
        assert 1 <= w.num_scored <= w.num_text <= window
        first = w.start + w.num_text - w.num_scored
        assert number == 0 or first - w.start >= window - stride
        scored += range(first, w.start + w.num_text)
    assert scored == list(range(num_tokens))


def test_result_adds_up_over_documents_tokens_and_words(skip_model, tokenizer):
    options = PerplexityOptions(window=16, stride=5, injection=UniformInjection(), seed=1)
    result = measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    lengths = [len(ids) for ids in TextEncoder(tokenizer).encode_batch([LONG, SHORT])]
    assert [(d.name, d.text_tokens, d.words) for d in result.documents] == [
        ("long", lengths[0], 20),
        ("short", lengths[1], 4),
    ]
    assert (result.text_tokens, result.words) == (sum(lengths), 24)
    for scores, nats in (
        (result.non_overlapping, [d.nats for d in result.documents]),
        (result.sliding, [d.sliding_nats for d in result.documents]),
    ):
        assert scores.nats == pytest.approx(sum(nats))
        assert scores.nats_per_token.estimate == pytest.approx(sum(nats) / sum(lengths))
        assert scores.perplexity.estimate == pytest.approx(math.exp(sum(nats) / sum(lengths)))
        assert scores.word_perplexity.estimate == pytest.approx(math.exp(sum(nats) / 24))
        assert scores.perplexity.low <= scores.perplexity.estimate <= scores.perplexity.high
    assert result.non_overlapping.nats != pytest.approx(result.sliding.nats, abs=1e-3)


def test_buckets_split_the_loss_by_context(skip_model, tokenizer):
    options = PerplexityOptions(window=12, injection=PeriodicInjection(), stride=12)
    result = measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    losses = {}
    scorer = TokenScorer(skip_model, tokenizer, options)
    for number, (_, text) in enumerate(DOCUMENTS):
        nats = scorer.score(scorer.encoder.encode_batch([text])[0], document_number=number, stride=12)
        for j, value in enumerate(nats):
            losses.setdefault(j % 12, []).append(value)
    ranges = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 11)]
    assert [(b.lowest_context, b.highest_context) for b in result.buckets] == ranges
    for bucket, (low, high) in zip(result.buckets, ranges, strict=True):
        inside = [value for j in range(low, high + 1) for value in losses[j]]
        assert bucket.text_tokens == len(inside)
        assert bucket.nats_per_token == pytest.approx(np.mean(inside))
    for document in result.documents:
        assert sum(document.context_tokens) == document.text_tokens
        assert sum(document.context_nats) == pytest.approx(document.nats)
        assert len(document.context_tokens) == len(document.context_nats) == len(ranges)


def test_batch_size_does_not_change_the_losses(skip_model, tokenizer):
    results = [
        measure_perplexity(
            skip_model,
            DOCUMENTS,
            tokenizer,
            PerplexityOptions(window=8, stride=3, injection=UniformInjection(ratio=0.2), batch_size=batch_size),
        )
        for batch_size in (1, 5)
    ]
    assert results[0].sliding.nats == pytest.approx(results[1].sliding.nats, abs=1e-4)


def test_uniform_injection_depends_on_the_seed(skip_model, tokenizer):
    def nats(seed):
        options = PerplexityOptions(window=16, injection=UniformInjection(ratio=0.3), seed=seed)
        return measure_perplexity(skip_model, DOCUMENTS, tokenizer, options).non_overlapping.nats

    assert nats(3) == nats(3)
    assert nats(3) != pytest.approx(nats(4), abs=1e-4)


def test_window_of_text_holds_the_same_text_under_every_injection(skip_model, tokenizer):
    results = [
        measure_perplexity(skip_model, DOCUMENTS, tokenizer, PerplexityOptions(window=18, injection=injection))
        for injection in (NoInjection(), UniformInjection(), PeriodicInjection(ratio=0.5))
    ]
    assert [r.text_tokens_per_window for r in results] == [18, 18, 18]
    assert [r.positions_per_window for r in results] == [18, 20, 36]


def test_window_of_positions_holds_the_metas_among_them(skip_model, tokenizer):
    options = PerplexityOptions(window=20, window_unit="positions", injection=UniformInjection(ratio=0.25))
    result = measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    assert (result.text_tokens_per_window, result.positions_per_window, result.stride) == (15, 20, 7)


def test_window_of_positions_holds_as_many_metas_as_a_training_block(skip_model, tokenizer):
    # four metas on one text token would have the ratio too
    options = PerplexityOptions(window=10, window_unit="positions", injection=UniformInjection(ratio=0.9))
    seen = []
    handle = skip_model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    handle.remove()
    assert {batch.shape[1] for batch in seen} == {10}


def test_default_window_of_a_model_without_a_longest_text_is_that_of_its_training(tokenizer):
    endless = make_model(tokenizer, memory={"anchors": "meta", "window": 8, "memory_limit": 4, "positions": "compact"})
    result = measure_perplexity(endless, DOCUMENTS, tokenizer, PerplexityOptions(injection=UniformInjection(ratio=0.2)))
    assert result.positions_per_window == 64
    named = PerplexityOptions(window=100, injection=UniformInjection(ratio=0.2))
    assert measure_perplexity(endless, DOCUMENTS, tokenizer, named).text_tokens_per_window == 100


def test_windows_of_a_graft_with_compact_positions_may_be_longer_than_its_model(tokenizer):
    size = TextEncoder(tokenizer).vocab_size
    for positions in ("text", "compact"):
        config = replace(CONFIG, positions=positions)
        model = trained("llama", config, vocab_size=size, max_position_embeddings=40)
        assert TokenScorer(model, tokenizer, PerplexityOptions()).positions_per_window == 40
        options = PerplexityOptions(window=60)
        if positions == "text":
            with pytest.raises(UsageError, match="at most 40 positions"):
                measure_perplexity(model, DOCUMENTS, tokenizer, options)
        else:
            assert measure_perplexity(model, DOCUMENTS, tokenizer, options).sliding.nats > 0


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (12, 6), (17, 8)])
def test_sliding_windows_overlap_by_default(skip_model, tokenizer, window, stride):
    assert TokenScorer(skip_model, tokenizer, PerplexityOptions(window=window)).stride == stride
    result = measure_perplexity(skip_model, DOCUMENTS, tokenizer, PerplexityOptions(window=window))
    assert (result.sliding.nats != result.non_overlapping.nats) == (window > 1)


def test_the_default_stride_of_long_windows_is_that_of_yarn(tokenizer):
    model = make_model(tokenizer, max_position_embeddings=2048)
    assert TokenScorer(model, tokenizer, PerplexityOptions(window=2048)).stride == 256


def test_stride_of_a_whole_window_scores_once(skip_model, tokenizer):
    calls = []
    options = PerplexityOptions(window=8, stride=8)
    result = measure_perplexity(
        skip_model, DOCUMENTS, tokenizer, options, progress=lambda done, total: calls.append((done, total))
    )
    assert result.sliding == result.non_overlapping
    assert calls[-1] == (result.text_tokens, result.text_tokens)


def test_progress_rises_to_the_text_tokens_that_the_windows_read(skip_model, tokenizer):
    calls = []
    options = PerplexityOptions(window=8, stride=2, batch_size=2)
    measure_perplexity(skip_model, DOCUMENTS, tokenizer, options, progress=lambda *numbers: calls.append(numbers))
    lengths = [len(ids) for ids in TextEncoder(tokenizer).encode_batch([LONG, SHORT])]
    total = sum(w.num_text for n in lengths for stride in (8, 2) for w in lay_windows(n, window=8, stride=stride))
    done = [d for d, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (total, total)


def test_strings_of_special_tokens_are_scored_as_plain_text(skip_model, tokenizer):
    text = "owl <|endoftext|> _PAUSE_ <|pad|> owl"
    result = measure_perplexity(skip_model, [("odd", text)], tokenizer, PerplexityOptions(window=16))
    assert result.text_tokens == len(TextEncoder(tokenizer).encode_batch([text])[0])
    assert result.text_tokens > 20


def test_tokenizer_of_a_saved_model_scores_like_the_one_it_was_made_from(skip_model, tokenizer, tmp_path):
    build_hf_tokenizer(tokenizer).save_pretrained(tmp_path)
    options = PerplexityOptions(window=16)
    again = measure_perplexity(skip_model, DOCUMENTS, load_text_tokenizer(str(tmp_path)), options)
    assert again == measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)


def test_first_tokens_of_a_document_are_scored_with_the_words_they_spell(skip_model, tokenizer):
    whole = measure_perplexity(skip_model, [("long", LONG)], tokenizer, PerplexityOptions(window=40, stride=40))
    options = PerplexityOptions(window=40, stride=40, max_tokens_per_document=12)
    cut = measure_perplexity(skip_model, [("long", LONG)], tokenizer, options)
    prefix = tokenizer.decode(TextEncoder(tokenizer).encode_batch([LONG])[0][:12].tolist())
    assert (cut.text_tokens, cut.words) == (12, len(prefix.split()))
    assert cut.non_overlapping.nats < whole.non_overlapping.nats


def test_interval_of_a_single_document_has_no_bounds(skip_model, tokenizer):
    result = measure_perplexity(skip_model, DOCUMENTS[:1], tokenizer, PerplexityOptions(window=16))
    assert (result.perplexity.low, result.perplexity.high) == (None, None)


def test_text_without_a_word_has_no_word_perplexity(skip_model, tokenizer):
    result = measure_perplexity(skip_model, [("blank", " \n ")], tokenizer, PerplexityOptions(window=16))
    assert result.non_overlapping.word_perplexity is None


INTERVENTIONS = [
    (ZeroEmbedding(),),
    (MeanEmbedding(), ZeroPosition()),
    (TokenEmbedding(token_id=5), NoPositionEdges(), NoMetaAttention(layers=(1,))),
]


@pytest.mark.parametrize("interventions", INTERVENTIONS, ids=lambda several: "+".join(i.kind for i in several))
def test_interventions_score_what_the_changed_model_scores(skip_model, tokenizer, interventions):
    fields = {"window": 16, "stride": 5, "injection": UniformInjection(ratio=0.3)}
    plain = PerplexityOptions(**fields)
    changed = measure_perplexity(
        skip_model, DOCUMENTS, tokenizer, PerplexityOptions(interventions=interventions, **fields)
    )
    counts = np.bincount(np.concatenate(TextEncoder(tokenizer).encode_batch([LONG, SHORT])))
    with intervene(skip_model, interventions, counts):
        by_hand = measure_perplexity(skip_model, DOCUMENTS, tokenizer, plain)
    assert changed.documents == by_hand.documents
    untouched = measure_perplexity(skip_model, DOCUMENTS, tokenizer, plain)
    assert changed.non_overlapping.nats != pytest.approx(untouched.non_overlapping.nats, abs=1e-3)
    assert (untouched.interventions, by_hand.interventions) == ([], [])
    assert changed.interventions == [i.model_dump(mode="json") for i in interventions]


def test_mean_embedding_counts_the_scored_tokens_alone(skip_model, tokenizer):
    fields = {"window": 16, "injection": UniformInjection(ratio=0.3), "max_tokens_per_document": 6}
    changed = measure_perplexity(
        skip_model, DOCUMENTS, tokenizer, PerplexityOptions(interventions=(MeanEmbedding(),), **fields)
    )
    ids = np.concatenate([row[:6] for row in TextEncoder(tokenizer).encode_batch([LONG, SHORT])])
    with intervene(skip_model, (MeanEmbedding(),), np.bincount(ids)):
        by_hand = measure_perplexity(skip_model, DOCUMENTS, tokenizer, PerplexityOptions(**fields))
    assert changed.documents == by_hand.documents


def test_injection_that_puts_nothing_into_a_window_warns(skip_model, tokenizer):
    options = PerplexityOptions(window=4, stride=2, injection=UniformInjection(ratio=0.1))
    with pytest.warns(UserWarning, match="uniform puts no meta-token into a window of 4"):
        measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)


def test_interventions_without_a_meta_token_change_no_bit_and_warn(skip_model, tokenizer):
    fields = {"window": 16, "stride": 5}
    options = PerplexityOptions(interventions=(ZeroEmbedding(), NoPositionEdges(), NoMetaAttention()), **fields)
    with pytest.warns(UserWarning, match="injection puts none"):
        changed = measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    assert (
        changed.documents == measure_perplexity(skip_model, DOCUMENTS, tokenizer, PerplexityOptions(**fields)).documents
    )


def test_intervention_that_does_not_fit_the_model_is_a_usage_error(tokenizer):
    model = make_model(tokenizer, meta_attention_layers="none")
    options = PerplexityOptions(window=8, injection=UniformInjection(), interventions=(NoMetaAttention(),))
    with pytest.raises(UsageError, match="expected a model with meta-attention"):
        measure_perplexity(model, DOCUMENTS, tokenizer, options)


def test_json_of_the_result_follows_the_declared_schema(skip_model, tokenizer):
    options = PerplexityOptions(window=16, injection=UniformInjection(), interventions=(NoMetaAttention(layers=(0,)),))
    result = measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)
    adapter = TypeAdapter(PerplexityResult)
    text = json.dumps(asdict(result), allow_nan=False)
    assert adapter.validate_json(text, strict=True) == result
    assert set(adapter.json_schema()["required"]) == set(json.loads(text))
    assert (result.dtype, result.device, result.loss_policy) == ("float64", "cpu", "skip")


def test_model_is_back_in_its_mode_even_after_an_error(tokenizer):
    model = make_model(tokenizer, hidden_dropout=0.5).train()
    first, second = (measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=16)) for _ in range(2))
    assert first == second
    with pytest.raises(ZeroDivisionError):
        measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=16), progress=lambda *_: 1 / 0)
    assert model.training
    assert model.model.layers[0].training


def test_model_of_transformers_is_scored_with_its_own_logits(tokenizer):
    torch.manual_seed(0)
    vocab_size = TextEncoder(tokenizer).vocab_size
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
        )
    )
    model.double().eval()
    result = measure_perplexity(model, [("long", LONG)], tokenizer, PerplexityOptions(window=128))
    ids = torch.tensor([[0, *TextEncoder(tokenizer).encode_batch([LONG])[0].tolist()]])
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert result.nats_per_token.estimate == pytest.approx(expected, abs=1e-5)


def test_losses_in_chunks_equal_cross_entropy_of_all_logits():
    torch.manual_seed(0)
    vocab_size = 2**21  # four rows of logits at a time
    hidden, head = torch.randn(2, 5, 2).double(), torch.nn.Linear(2, vocab_size).double()
    targets = torch.randint(vocab_size, (2, 5))
    targets[0, 3] = -100
    with torch.no_grad():
        losses = token_losses(hidden, head, targets, vocab_size=vocab_size)
        expected = [
            torch.nn.functional.cross_entropy(head(h), t)
            for h, t in zip(hidden.flatten(0, 1), targets.flatten(), strict=True)
            if t != -100
        ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_losses_of_bfloat16_are_float32():
    losses = token_losses(torch.randn(3, 4).bfloat16(), torch.nn.Identity(), torch.tensor([0, 1, 2]), vocab_size=4)
    assert losses.dtype == torch.float32


def test_window_longer_than_the_model_names_both_lengths(skip_model, tokenizer):
    options = PerplexityOptions(window=60, injection=UniformInjection())
    with pytest.raises(UsageError, match=r"at most 64 positions .* found 67"):
        measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)


def test_windows_beyond_the_model_are_scored_if_asked_for_as_by_a_model_with_a_longer_window(tokenizer):
    short, long = (make_model(tokenizer, max_position_embeddings=window) for window in (32, 128))
    options = PerplexityOptions(window=40, injection=PeriodicInjection(ratio=0.2), extrapolate=True)
    beyond, within = (measure_perplexity(model, DOCUMENTS, tokenizer, options) for model in (short, long))
    assert max(document.text_tokens for document in beyond.documents) > 32
    assert [d.nats for d in beyond.documents] == pytest.approx([d.nats for d in within.documents])
    assert [d.sliding_nats for d in beyond.documents] == pytest.approx([d.sliding_nats for d in within.documents])
    assert short.config.max_position_embeddings == 32
    with pytest.raises(UsageError, match=r"at most 32 positions .* or extrapolate"):
        measure_perplexity(short, DOCUMENTS, tokenizer, options.model_copy(update={"extrapolate": False}))


def test_positions_from_a_range_are_spread_for_the_window_that_is_scored(tokenizer):
    changes = {"position_encoding": "learned", "position_range": 200}
    options = PerplexityOptions(window=24)
    models = (make_model(tokenizer, max_position_embeddings=window, **changes) for window in (24, 150))
    first, second = (measure_perplexity(model, DOCUMENTS, tokenizer, options) for model in models)
    assert first.sliding.nats == pytest.approx(second.sliding.nats)


def test_windows_do_not_go_beyond_a_table_of_positions(tokenizer):
    model = make_model(tokenizer, position_encoding="learned", max_position_embeddings=32)
    with pytest.raises(UsageError, match="at most 32 positions"):
        measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=40, extrapolate=True))


def test_window_of_metas_alone_is_a_usage_error(skip_model, tokenizer):
    options = PerplexityOptions(window=2, window_unit="positions", injection=UniformInjection(ratio=0.9))
    with pytest.raises(UsageError, match="at least one text token"):
        measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)


def test_stride_longer_than_the_text_of_a_window_is_a_usage_error(skip_model, tokenizer):
    options = PerplexityOptions(window=16, window_unit="positions", injection=UniformInjection(ratio=0.5), stride=9)
    with pytest.raises(UsageError, match="at most the 8 text tokens of a window, found 9"):
        measure_perplexity(skip_model, DOCUMENTS, tokenizer, options)


def test_injection_into_a_model_without_a_meta_token_is_a_usage_error(tokenizer):
    model = make_model(tokenizer, meta_token_id=None, meta_attention_layers="none")
    with pytest.raises(UsageError, match="meta_token_id None"):
        measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=8, injection=UniformInjection()))


def test_tokenizer_of_another_model_is_a_usage_error_that_names_both_sizes(skip_model, tokenizer):
    other = train_tokenizer([LONG], 260)
    own = TextEncoder(tokenizer).vocab_size
    with pytest.raises(UsageError, match=rf"{own} tokens .* found 260"):
        measure_perplexity(skip_model, DOCUMENTS, other, PerplexityOptions(window=8))


def test_tokenizer_larger_than_a_plain_model_is_a_usage_error(tokenizer):
    model = make_model(tokenizer, meta_token_id=None, pad_token_id=0, vocab_size=270)
    with pytest.raises(UsageError, match="at most 270 tokens"):
        measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=8))


@pytest.mark.parametrize("documents", [[], [("long", LONG), ("nothing", "")]], ids=["no document", "an empty one"])
def test_documents_without_a_token_are_a_data_error(skip_model, tokenizer, documents):
    with pytest.raises(DataError, match="expected"):
        measure_perplexity(skip_model, documents, tokenizer, PerplexityOptions(window=8))


def test_loss_that_is_not_finite_is_a_numeric_error_that_names_the_document(tokenizer):
    model = make_model(tokenizer)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(NumericError, match="long"):
        measure_perplexity(model, DOCUMENTS, tokenizer, PerplexityOptions(window=8))


@pytest.mark.parametrize("field", ["window", "stride", "batch_size", "max_tokens_per_document"])
def test_options_refuse_a_zero(field):
    with pytest.raises(ValueError, match=rf"^PerplexityOptions\.{field} should be greater than or equal to 1, not 0$"):
        PerplexityOptions(**{field: 0})
