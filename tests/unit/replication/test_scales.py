"""The scales in the package: complete, valid to the last command, and fixed where they were fixed."""

import re
import shutil
from pathlib import Path

import pytest

from metatokens.config.contrasts import Contrasts
from metatokens.config.loading import read_file
from metatokens.config.sweep import load_sweep
from metatokens.errors import DataError, UsageError
from metatokens.replication.cost import estimate
from metatokens.replication.plan import SCALES, Plan, load_scale

PARTS = {"E1", "E1-list", "E2", "E3", "E4", "E5"}
NOT_COMPARED = {"meta-learned", "punctuation"}  # E3 starts from the one; E5 scores the other with other places


@pytest.mark.long
@pytest.mark.parametrize("name", SCALES)
def test_every_command_of_a_scale_can_be_planned_before_the_first_has_run(name: str, tmp_path: Path) -> None:
    scale = load_scale(name)
    costs = {cost.name: cost for cost in estimate(scale, tmp_path / "out")}
    assert costs.keys() == PARTS
    assert all(cost.to_do == cost.trainings > 0 and cost.hours > 0 for cost in costs.values())
    assert all((scale.folder / part.contrasts).is_file() for part in scale.plan.parts if part.contrasts)
    assert not (tmp_path / "out").exists()


def test_contrasts_are_the_same_at_every_scale() -> None:
    def named(name: str) -> str:
        scale = load_scale(name)
        (part,) = [part for part in scale.plan.parts if part.name == "E1"]
        return (scale.folder / str(part.contrasts)).read_text().partition("contrasts:")[2]

    texts = [named(name) for name in SCALES]
    assert texts == texts[:1] * len(texts)


@pytest.mark.parametrize("name", SCALES)
def test_the_arms_and_seeds_of_contrasts_are_those_of_their_sweeps(name: str) -> None:
    scale = load_scale(name)
    for part in scale.plan.parts:
        if part.contrasts is None:
            continue
        named = read_file(scale.folder / part.contrasts, schema=Contrasts)
        steps = {step.run.split()[-1] for step in part.steps}
        for task in named.tasks.keys() & steps:
            sweep = load_sweep(scale.folder / f"{task}.yaml")
            assert named.arms == sweep.axes["arm"].keys() - NOT_COMPARED
            assert len(sweep.seeds) == named.tasks[task]


def refuse(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    """Change a file of contrasts of the scale tiny, and expect the scale to be refused."""
    shutil.copytree(load_scale("tiny").folder, tmp_path / "tiny")
    (tmp_path / "tiny" / "frozen.sha256").unlink()
    contrasts = tmp_path / "tiny" / name
    changed = contrasts.read_text().replace(old, new)
    assert changed != contrasts.read_text()
    contrasts.write_text(changed)
    with pytest.raises(UsageError, match=re.escape(message)):
        load_scale(str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("endpoint: nats", "endpoint: nat", "endpoint"),
        ("first: meta,", "first: mata,", "arms of e4.yaml, found mata"),
        ("evaluation: books", "evaluation: book", "an evaluation of pause in e4.yaml, found book"),
        ("evaluation: books", "evaluation: no-meta-tokens", "an evaluation of deeper in e4.yaml, found no-meta"),
        ("{e4: 3}", "{e4: 5}", "3 seeds, as e4.yaml has, found 5"),
        ("endpoint: nats", "endpoint: solve", "settings that agree"),
        ("second: pause,", "second: meta,", "settings that agree"),
        ("{e4: 3}", "{e5: 3}", "a sweep of part E4, found e5"),
        ("expected: lower", "expect: lower", "expect"),
        ("expected: lower", "expected: faster", "nats cannot be expected to be faster"),
        ("endpoint: nats", "endpoint: accuracy", "accuracy needs lengths"),
        ("first: meta,", "first: meta@no-meta-tokens,", "only accuracy compares evaluations"),
    ],
)
def test_contrasts_that_fit_no_sweep_are_refused_before_anything_runs(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    refuse(tmp_path, "contrasts-books.yaml", old, new, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "first: rope@zero-position,",
            "first: rope@zero-places,",
            "an evaluation of rope in e3.yaml, found zero-places",
        ),
        (
            "learned@zero-position",
            "learned@no-position-edges",
            "an evaluation of learned in e3.yaml, found no-position",
        ),
        ("first: rope@zero-position,", "first: rope@whole,", "compares an arm with itself"),
        ("lengths: [1-48,", "lengths: [1-47,", "lengths of zero-position in e3.yaml, found 1-47"),
        ("lengths: [1-48,", "lengths: [foo,", "foo"),
        ("lengths: [1-48,", "lengths: [97-192,", "an entry twice"),
        ("margin: 0.05", "margin: 5", "0.05 for 5 points"),
    ],
)
def test_contrasts_of_answers_that_nobody_asks_for_are_refused_before_anything_runs(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    refuse(tmp_path, "contrasts-zeroed.yaml", old, new, message)


def test_the_contrasts_of_the_guide_are_valid(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs/guide/sweeps.md").read_text()
    (shown,) = [block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "endpoint:" in block]
    (tmp_path / "contrasts.yaml").write_text(shown)
    named = read_file(tmp_path / "contrasts.yaml", schema=Contrasts)
    assert ("meta", "zeroed") in named.sides


def test_a_file_that_was_fixed_before_the_first_run_may_not_change(tmp_path: Path) -> None:
    shutil.copytree(load_scale("tiny").folder, tmp_path / "tiny")
    contrasts = tmp_path / "tiny" / "contrasts.yaml"
    contrasts.write_text(contrasts.read_text().replace("margin: 1.5", "margin: 3"))
    with pytest.raises(DataError, match=r"contrasts\.yaml: .*fixed before the first run"):
        load_scale(str(tmp_path / "tiny"))


def test_an_unknown_scale_names_those_that_exist() -> None:
    with pytest.raises(UsageError, match="tiny, small, paper"):
        load_scale("huge")


def test_a_step_that_could_not_tell_whether_it_is_done_is_refused() -> None:
    with pytest.raises(ValueError, match="needs creates or writes"):
        Plan(parts=[{"name": "A", "question": "?", "steps": [{"run": "extend model --out longer"}]}])
