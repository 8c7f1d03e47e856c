"""What the registry makes of a function that yields rows: records, corrections, kept arrays and reasons."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from analysis_inputs import task_inputs, text_inputs
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import MEASURES, Measure, Row, Rows, correct, measure, record_of, run_measure
from metatokens.analysis.results import Record
from metatokens.errors import UsageError
from metatokens.evaluation.statistics import Interval
from metatokens.lens.residuals import capture_residuals

ROOT = Path(__file__).parents[3]
RISING = np.linspace(0.1, 0.3, 12)


@pytest.fixture(autouse=True)
def _restored_registry() -> Iterator[None]:
    before = dict(MEASURES)
    yield
    MEASURES.clear()
    MEASURES.update(before)


@pytest.fixture(scope="module")
def inputs_of_module() -> Inputs:
    return text_inputs()


@pytest.fixture
def inputs(inputs_of_module: Inputs) -> Inputs:
    inputs_of_module.skipped.clear()
    inputs_of_module.arrays.clear()
    return inputs_of_module


def registered(rows: Callable[[Inputs], Rows], **options: object) -> Measure:
    measure("attention", "nats", **options)(rows)  # type: ignore[arg-type]
    return MEASURES[rows.__name__]


def recorded(values: object, statistic: str = "mean", **options: object) -> Record:
    """Return the record of one row without coordinates."""

    def example(_: Inputs) -> Rows:
        yield Row({}, values)  # type: ignore[arg-type]

    MEASURES.pop("example", None)
    return record_of(registered(example, statistic=statistic, **options), Row({}, values), seed=0)  # type: ignore[arg-type]


# registering -----------------------------------------------------------------------------------------------------


def test_a_measure_is_known_by_its_function_s_name_and_docstring() -> None:
    def example_change(_: Inputs) -> Rows:
        """Entropy of this minus
        that.

        In detail.
        """
        yield Row({}, RISING)

    found = registered(example_change, axes=("layer",))
    assert (found.name, found.part, found.unit, found.axes) == ("example_change", "attention", "nats", ("layer",))
    assert found.definition == "Entropy of this minus that."


def test_a_second_measure_of_a_name_is_refused() -> None:
    def example_change(_: Inputs) -> Rows:
        yield Row({}, RISING)

    registered(example_change)
    with pytest.raises(ValueError, match="already a measure example_change, in test_measures"):
        registered(example_change)


def test_rows_by_an_axis_that_was_not_named_are_refused(inputs: Inputs) -> None:
    def example(_: Inputs) -> Rows:
        yield Row({"layer": 0, "head": 1}, RISING)

    with pytest.raises(ValueError, match="measure example has rows by head"):
        run_measure(registered(example, axes=("layer",)), inputs)


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([Row({}, 0.5)], {}, "(mean) yielded a single number, not values (documents)"),
        ([Row({}, np.ones((12, 2)))], {}, "(mean) yielded values (documents, 2), not values (documents)"),
        ([Row({}, RISING)], {"statistic": "ratio"}, "(ratio) yielded values (documents), not values (documents, 2)"),
        ([Row({}, RISING)], {"statistic": "given"}, "not an interval"),
        ([Row({}, Interval(0.2, 0.1, 0.3))], {}, "(mean) yielded an interval"),
        ([Row({"layer": 0}, RISING), Row({"layer": 0}, RISING)], {"axes": ("layer",)}, "several rows at the same"),
    ],
)
def test_rows_of_another_form_than_declared_are_refused(
    inputs: Inputs, rows: list[Row], options: dict[str, object], problem: str
) -> None:
    def example(_: Inputs) -> Rows:
        return rows

    with pytest.raises(ValueError, match=f"measure example.*{re.escape(problem)}"):
        run_measure(registered(example, **options), inputs)


@pytest.mark.parametrize("option", ["test", "keep"])
def test_only_means_are_tested_and_kept(option: str) -> None:
    def example(_: Inputs) -> Rows:
        yield Row({}, RISING)

    with pytest.raises(ValueError, match="measure example has the statistic ratio; only means are tested and kept"):
        registered(example, statistic="ratio", **{option: True})
    assert "example" not in MEASURES


def test_every_measure_of_the_package_is_defined_in_a_sentence() -> None:
    for one in MEASURES.values():
        assert one.definition.endswith("."), one.name


# what is shared and what is left out -----------------------------------------------------------------------------


def test_what_is_shared_runs_once_and_its_error_is_raised_again(inputs: Inputs) -> None:
    runs = []

    @shared
    def number(_: Inputs) -> int:
        runs.append("number")
        return 3

    @shared
    def nothing(_: Inputs) -> int:
        runs.append("nothing")
        raise UsageError("texts", expected="one", found="none", remedy="add one")

    assert number(inputs) + number(inputs) == 6
    for _ in range(2):
        with pytest.raises(UsageError, match="texts: expected one"):
            nothing(inputs)
    assert runs == ["number", "nothing"]


def test_what_is_provided_takes_the_place_of_what_is_shared(inputs: Inputs) -> None:
    @shared
    def number(_: Inputs) -> int:
        raise UsageError("texts", expected="one", found="none", remedy="add one")

    inputs.provide(number, 7)
    assert number(inputs) == 7


def test_measures_that_cannot_run_are_left_out_and_a_reason_of_several_is_said_once(inputs: Inputs) -> None:
    @shared
    def texts(_: Inputs) -> int:
        raise UsageError("texts", expected="one", found="none", remedy="add one")

    def first(inputs: Inputs) -> Rows:
        yield Row({}, [texts(inputs)])

    def second(inputs: Inputs) -> Rows:
        yield Row({}, [texts(inputs)])

    assert [run_measure(registered(one), inputs) for one in (first, second)] == [[], []]
    assert inputs.skipped == ["attention: texts: expected one, found none; add one"]


def test_a_measure_of_the_other_subject_is_told_to_declare_its_own() -> None:
    with pytest.raises(ValueError, match='declare a measure of tasks with subject="task"'):
        _ = text_inputs().task
    with pytest.raises(ValueError, match='declare a measure of texts with subject="text"'):
        _ = task_inputs().text


# statistics ------------------------------------------------------------------------------------------------------


def test_the_mean_leaves_out_documents_without_the_number() -> None:
    found = recorded([*RISING, np.nan], test=True, positive="more")
    assert (found.num_documents, found.measure, found.unit) == (12, "example", "nats")
    assert found.value == pytest.approx(RISING.mean())
    assert found.low < found.value < found.high  # type: ignore[operator]
    assert found.p_value == pytest.approx(2 / 2**12)


def test_a_ratio_is_that_of_sums_and_what_it_leaves_is_explained() -> None:
    sums = np.stack([RISING, RISING * 4], axis=1)
    ratio, explained = recorded(sums, "ratio"), recorded(sums, "explained")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.25, 0.25, 0.25))
    assert explained.value == pytest.approx(0.75)
    uneven = recorded([[1.0, 1.0], [0.0, 3.0]] * 4, "ratio")
    assert uneven.value == pytest.approx(0.25)  # and not 0.5, the mean of ratios


def test_a_ratio_to_nothing_has_no_value() -> None:
    found = recorded(np.zeros((12, 2)), "ratio")
    assert (found.value, found.low, found.note) == (None, None, "no document has it")


@pytest.mark.parametrize(("statistic", "of_one"), [("ratio", [1.0, 1.0]), ("r_squared", [5.0, 3.0, 4.0, 0.1])])
def test_what_one_document_alone_has_leaves_resamples_without_it_and_so_no_interval(
    statistic: str, of_one: list[float]
) -> None:
    found = recorded([of_one, *np.zeros((11, len(of_one)))], statistic)
    assert found.value is not None
    assert (found.low, found.high, found.note) == (None, None, "undefined in some resamples: no interval")


def test_r_squared_is_that_of_all_rows_together() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    y = generator.normal(size=(9, 40)) + 3
    m = y + generator.normal(size=(9, 40)) * 0.3
    columns = np.stack([np.full(9, 40.0), y.sum(1), (y**2).sum(1), ((y - m) ** 2).sum(1)], axis=1)
    expected = 1 - ((y - m) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert recorded(columns, "r_squared").value == pytest.approx(expected)


def test_an_accuracy_of_one_has_an_interval_below_it() -> None:
    found = recorded(np.ones(12), "accuracy")
    assert found.high == 1
    assert found.low == pytest.approx(12 / (12 + 1.959964**2))  # Wilson


def test_a_given_interval_is_recorded_as_it_is() -> None:
    row = Row({}, Interval(0.2, 0.1, 0.3), num_documents=30, note="by jackknife")
    found = record_of(MEASURES["area"], row, seed=0)
    assert (found.value, found.low, found.high) == (0.2, 0.1, 0.3)
    assert (found.num_documents, found.note, found.p_value) == (30, "by jackknife", None)


@pytest.mark.parametrize("interval", [Interval(np.nan, 0.1, 0.3), Interval(0.2, 0.1, np.inf)])
def test_a_given_interval_that_is_not_finite_has_no_bounds(interval: Interval) -> None:
    found = record_of(MEASURES["area"], Row({}, interval, num_documents=30), seed=0)
    assert found.value == (None if np.isnan(interval.estimate) else interval.estimate)
    assert (found.low, found.high) == (None, None)


def test_a_coordinate_of_numpy_is_recorded_as_the_number_it_is() -> None:
    found = record_of(MEASURES["sharpening"], Row({"layer": np.int64(1)}, RISING), seed=0)  # type: ignore[dict-item]
    assert [type(place) for place in found.at.values()] == [int]


@pytest.mark.parametrize("statistic", ["mean", "accuracy"])
def test_few_documents_have_a_value_without_an_interval(statistic: str) -> None:
    found = recorded(RISING[:3], statistic, test=statistic == "mean", positive="more")
    assert found.value == pytest.approx(RISING[:3].mean())
    assert (found.low, found.high, found.p_value) == (None, None, None)
    assert found.note == "fewer than 8 documents: no interval"


@pytest.mark.parametrize("values", [[np.nan] * 12, []])
def test_no_document_at_all_has_no_value(values: list[float]) -> None:
    found = recorded(values)
    assert (found.value, found.low, found.num_documents, found.note) == (None, None, 0, "no document has it")


def test_p_values_are_corrected_over_the_rows_of_one_measure_that_have_coordinates() -> None:
    def example(_: Inputs) -> Rows:
        yield Row({}, RISING)

    chosen = registered(example, axes=("layer",), test=True, positive="more")
    rows = [Row({}, RISING), Row({"layer": 0}, RISING), Row({"layer": 1}, RISING - 0.2)]
    overall, first, second = correct([record_of(chosen, row, seed=0) for row in rows])
    assert overall.adjusted_p is None
    assert first.adjusted_p == pytest.approx(2 * first.p_value)  # type: ignore[operator]
    assert second.adjusted_p == second.p_value


def test_kept_values_of_all_documents_stand_by_their_axes(inputs: Inputs) -> None:
    def example(_: Inputs) -> Rows:
        for layer, head in ((1, 0), (0, 1)):
            yield Row({"layer": layer, "head": head}, RISING + layer)
        yield Row({}, RISING)

    run_measure(registered(example, axes=("layer", "head"), keep=True), inputs)
    kept = inputs.arrays["example"]
    assert kept.shape == (12, 2, 2)
    np.testing.assert_array_equal(kept[:, 1, 0], (RISING + 1).astype(np.float32))
    assert np.isnan(kept[:, 0, 0]).all()


def test_kept_values_of_a_measure_without_axes_are_those_of_the_documents(inputs: Inputs) -> None:
    def example(_: Inputs) -> Rows:
        yield Row({}, RISING)

    run_measure(registered(example, keep=True), inputs)
    np.testing.assert_array_equal(inputs.arrays["example"], RISING.astype(np.float32))


@pytest.mark.parametrize("found", [[], [Row({}, RISING)]])
def test_a_kept_measure_without_rows_at_all_axes_leaves_no_array(inputs: Inputs, found: list[Row]) -> None:
    def nothing_there(inputs: Inputs) -> Rows:
        del inputs
        return found

    assert run_measure(registered(nothing_there, axes=("layer", "head"), keep=True), inputs) == found
    assert "nothing_there" not in inputs.arrays


# the way to add one ----------------------------------------------------------------------------------------------


def test_the_example_of_contributing_is_a_measure_in_one_function(inputs: Inputs) -> None:
    """Run the block as it stands there: nothing else is needed for records with intervals, by layer."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^## A new measure$.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    exec(block, {})
    added = MEASURES["state_length"]
    records = [record_of(added, row, seed=0) for row in run_measure(added, inputs)]
    assert [one.at for one in records] == [{"layer": layer} for layer in range(3)]
    assert all(one.low < one.value < one.high for one in records)
    lengths = [capture_residuals(inputs.lens, one.input_ids)[2].norm(dim=-1) for one in inputs.subject.documents]
    expected = [
        float(length[one.is_meta].mean() / length[~one.is_meta].mean())
        for length, one in zip(lengths, inputs.subject.documents, strict=True)
    ]
    assert records[2].value == pytest.approx(np.mean(expected))


def test_every_difference_says_what_a_positive_number_means_and_none_is_named_for_a_fall() -> None:
    is_difference = re.compile(
        r"\bminus\b|\bRise of\b|\bChange of\b|\bArea between\b|\bsaves over\b|\bhow much more\b", re.I
    )
    for one in MEASURES.values():
        text = " ".join((one.rows.__doc__ or "").split())
        assert (one.positive is not None) >= bool(one.test or is_difference.search(text)), f"{one.name}: {text}"
        if one.positive is not None:
            assert one.definition.endswith(f" Positive: {one.positive}.")
            assert not re.search("drop|fall|change|decline", one.name), f"{one.name}: name what meta-tokens bring"


def test_a_tested_difference_cannot_leave_its_sign_open() -> None:
    with pytest.raises(ValueError, match="say with positive= what a positive number means"):

        @measure("attention", "nats", test=True)
        def unsigned(inputs: Inputs) -> Rows:
            """Something minus something."""
            yield Row({}, np.ones(len(inputs.subject.documents)))


def test_the_guide_lists_every_measure_with_its_definition() -> None:
    guide = (ROOT / "docs" / "guide" / "analysis.md").read_text(encoding="utf-8")
    for one in MEASURES.values():
        (line,) = re.findall(rf"^\| `{one.name}` \|.*$", guide, re.MULTILINE)
        assert one.definition in line, f"{one.name}: run docs/facts.py --write"
