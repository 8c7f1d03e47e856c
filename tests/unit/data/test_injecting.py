import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatokens.config.schema import (
    ExplicitInjection,
    NoInjection,
    PeriodicInjection,
    PunctuationInjection,
    ThoughtInjection,
    UniformInjection,
)
from metatokens.data.injection import inject_into_prompt, inject_meta_tokens, sample_meta_positions
from metatokens.data.keyed_random import hash_key, splitmix64

META = 999
POLICIES = [UniformInjection(ratio=0.3), PeriodicInjection(ratio=0.3), PunctuationInjection(ratio=0.3), NoInjection()]


def positions(injection, num_rows=8, block_size=32, seed=0, epoch=0, ends_clause=None, text=None, sample_ids=None):
    sample_ids = np.arange(num_rows) if sample_ids is None else np.asarray(sample_ids)
    num_text = block_size - injection.num_meta(block_size)
    text = np.tile(np.arange(num_text + 1), (len(sample_ids), 1)) if text is None else text
    ends_clause = np.arange(text.max() + 1) % 7 == 3 if ends_clause is None else ends_clause
    return sample_meta_positions(
        injection,
        sample_ids=sample_ids,
        block_size=block_size,
        seed=seed,
        epoch=epoch,
        text=text,
        ends_clause=ends_clause,
    )


def test_splitmix64_gives_the_published_sequence():
    # first outputs of Vigna's splitmix64.c from the seed 1234567
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hash_key_differs_when_words_change_places():
    assert hash_key(1, 2) != hash_key(2, 1)


@pytest.mark.parametrize("injection", POLICIES, ids=lambda injection: injection.kind)
def test_positions_rise_inside_the_block_for_every_policy(injection):
    result = positions(injection)
    assert result.dtype == np.int64
    assert result.shape == (8, injection.num_meta(32))
    assert (np.diff(result, axis=1) > 0).all()
    assert ((result >= 0) & (result < 32)).all()


@pytest.mark.parametrize("injection", POLICIES, ids=lambda injection: injection.kind)
def test_positions_of_a_sample_do_not_depend_on_the_batch(injection):
    together = positions(injection, sample_ids=[5, 900, 17])
    for row, sample_id in enumerate([5, 900, 17]):
        np.testing.assert_array_equal(positions(injection, sample_ids=[sample_id])[0], together[row])


def test_positions_accept_one_epoch_per_row():
    mixed = positions(UniformInjection(), sample_ids=[4, 4], epoch=np.array([0, 1]))
    np.testing.assert_array_equal(mixed[0], positions(UniformInjection(), sample_ids=[4], epoch=0)[0])
    np.testing.assert_array_equal(mixed[1], positions(UniformInjection(), sample_ids=[4], epoch=1)[0])


def test_uniform_positions_are_nested_when_the_ratio_grows():
    few, many = positions(UniformInjection(ratio=0.1)), positions(UniformInjection(ratio=0.4))
    assert all(set(a) <= set(b) for a, b in zip(few.tolist(), many.tolist(), strict=True))


def test_periodic_positions_end_the_block_with_a_meta_token():
    assert positions(PeriodicInjection(ratio=0.25), block_size=16)[0].tolist() == [3, 7, 11, 15]


def test_explicit_positions_are_the_given_ones():
    assert positions(ExplicitInjection(positions=(0, 3)), num_rows=2).tolist() == [[0, 3], [0, 3]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 0.9), st.floats(0, 1), st.integers(0, 2**32))
def test_punctuation_puts_metas_right_after_clauses_before_it_fills(num_extra, ratio, clause_share, seed):
    injection = PunctuationInjection(ratio=ratio)
    block_size = 8 + num_extra
    num_meta = injection.num_meta(block_size)
    num_text = block_size - num_meta
    if num_text < 1 or num_meta < 1:
        return
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 50, (6, num_text + 1))
    ends_clause = rng.random(50) < clause_share
    layout = positions(injection, num_rows=6, block_size=block_size, seed=seed, text=text, ends_clause=ends_clause)
    batch = inject_meta_tokens(text, layout, meta_token_id=META, loss_policy="skip")
    assert layout.shape == (6, num_meta)
    for row, input_ids in enumerate(batch.input_ids.tolist()):
        clauses = int(ends_clause[text[row, :num_text]].sum())
        followed = sum(
            current != META and bool(ends_clause[current]) and following == META
            for current, following in zip(input_ids, [*input_ids[1:], None], strict=True)
        )
        assert followed == min(clauses, num_meta)


def test_thoughts_end_even_stretches_of_text_as_single_tokens_do():
    thoughts = positions(ThoughtInjection(ratio=0.5, length=2), num_rows=2, block_size=16)
    assert thoughts.tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]] * 2
    alone = positions(PeriodicInjection(ratio=0.2), num_rows=1, block_size=10)  # as many places in as much text
    assert (thoughts[0, ::4] - 3 * np.arange(2)).tolist() == alone[0].tolist() == [4, 9]


def test_thoughts_stand_whole_where_single_tokens_stand_after_clauses():
    text = np.array([[1, 2, 9, 3, 4, 9, 5, 6, 7, 8]])
    ends_clause = np.arange(10) == 9
    injection = ThoughtInjection(ratio=0.5, length=1, after="punctuation")
    layout = positions(injection, num_rows=1, block_size=15, text=text, ends_clause=ends_clause)
    batch = inject_meta_tokens(text, layout, meta_token_id=META, loss_policy="skip")
    assert batch.input_ids[0, :12].tolist() == [1, 2, 9, META, META, META, 3, 4, 9, META, META, META]
    with pytest.raises(ValueError, match=r"punctuation needs .*ends_clause"):
        sample_meta_positions(injection, sample_ids=np.arange(2), block_size=32, seed=0, epoch=0)


def test_a_block_holds_whole_thoughts_alone():
    injection = ThoughtInjection(ratio=0.1, length=3)
    assert [injection.num_meta(size) for size in (10, 24, 26, 74, 76)] == [0, 0, 5, 5, 10]


def test_punctuation_without_a_clause_table_is_a_value_error():
    with pytest.raises(ValueError, match=r"punctuation needs .*ends_clause"):
        sample_meta_positions(PunctuationInjection(), sample_ids=np.arange(2), block_size=32, seed=0, epoch=0)


def test_inject_gives_the_rows_drawn_in_the_docstring():
    a, b, c, d, e, _ = 1, 2, 3, 4, 5, -100
    text, layout = np.array([[a, b, c, d, e]]), np.array([[0, 2, 5]])
    skip = inject_meta_tokens(text, layout, meta_token_id=META, loss_policy="skip")
    retarget = inject_meta_tokens(text, layout, meta_token_id=META, loss_policy="retarget")
    assert skip.input_ids.tolist() == [[META, a, META, b, c, META, d]]
    assert skip.targets.tolist() == [[_, _, b, c, _, d, e]]
    assert retarget.targets.tolist() == [[_, b, _, c, d, _, e]]


def test_inject_lets_the_last_meta_of_a_closing_run_predict_the_next_block():
    batch = inject_meta_tokens(np.array([[1, 2, 3]]), np.array([[2, 3, 4]]), meta_token_id=META, loss_policy="skip")
    assert batch.targets.tolist() == [[2, -100, -100, -100, 3]]


def test_inject_without_text_is_a_usage_error(fails):
    with fails(2, "no trainable target"):
        inject_meta_tokens(np.array([[1]]), np.array([[0, 1]]), meta_token_id=META, loss_policy="skip")


@pytest.mark.parametrize("layout", [[0, 5], [-1, 0], [2, 2]])
def test_inject_refuses_positions_outside_or_twice(layout):
    with pytest.raises(ValueError, match="meta_positions"):
        inject_meta_tokens(np.array([[1, 2, 3, 4]]), np.array([layout]), meta_token_id=META, loss_policy="skip")


@pytest.mark.filterwarnings("ignore:injection.kind")
@given(st.integers(0, 300), st.floats(0, 0.99), st.sampled_from(["uniform", "periodic", "punctuation", "thought"]))
@settings(max_examples=60, deadline=None)
def test_prompt_keeps_its_text_and_the_ratio_of_its_total_length(num_text, ratio, kind):
    classes = {"uniform": UniformInjection, "periodic": PeriodicInjection, "punctuation": PunctuationInjection}
    classes["thought"] = ThoughtInjection
    injection = classes[kind](ratio=ratio)
    text = list(range(num_text))
    result = inject_into_prompt(
        text, injection, meta_token_id=META, seed=3, ends_clause=np.arange(num_text + 1) % 5 == 0
    )
    assert [token for token in result if token != META] == text
    assert len(result) - num_text == (injection.num_meta(len(result)) if num_text else 0)


def test_prompt_uses_the_explicit_positions_that_its_text_reaches():
    injection = ExplicitInjection(positions=(1, 4, 9))
    assert inject_into_prompt([1, 2, 3], injection, meta_token_id=META, seed=0) == [1, META, 2, 3, META]


def test_prompt_without_injection_stays_as_it_is():
    assert inject_into_prompt([1, 2, 3], NoInjection(), meta_token_id=META, seed=0) == [1, 2, 3]


def test_import_of_injection_needs_numpy_only():
    heavy = "torch transformers tokenizers tiktoken pydantic datasets pyarrow"
    script = f"import metatokens.data.injection, sys; print(*set('{heavy}'.split()) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_import_of_the_data_modules_loads_no_torch():
    modules = "collator injection loader prepare shards sources tokenizer"
    script = (
        f"import importlib, sys; [importlib.import_module('metatokens.data.' + m) for m in '{modules}'.split()]; "
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'metatokens.model'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("injection", [UniformInjection(ratio=0.1), ExplicitInjection(positions=(9,))])
def test_prompt_too_short_for_a_meta_token_warns(injection):
    with pytest.warns(UserWarning, match=f"{injection.kind} puts no meta-token into a prompt; lengthen the text"):
        assert inject_into_prompt([1, 2, 3, 4, 5], injection, meta_token_id=META, seed=0) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("injection", [UniformInjection(ratio=0), NoInjection(), ExplicitInjection(positions=())])
def test_prompt_that_is_to_have_no_meta_token_warns_of_nothing(injection):
    assert inject_into_prompt([1, 2, 3], injection, meta_token_id=META, seed=0) == [1, 2, 3]
