"""The scales in the package: complete, valid to the last command, and fixed where they were fixed."""

import shutil
from pathlib import Path

import pytest

from metatokens.errors import DataError, UsageError
from metatokens.replication.cost import estimate
from metatokens.replication.plan import SCALES, Plan, load_scale

PARTS = {"E1", "E2", "E3", "E4", "E5"}


@pytest.mark.long
@pytest.mark.parametrize("name", SCALES)
def test_every_command_of_a_scale_can_be_planned_before_the_first_has_run(name: str, tmp_path: Path) -> None:
    costs = {cost.name: cost for cost in estimate(load_scale(name), tmp_path / "out")}
    assert costs.keys() == PARTS | ({"E1-list"} if name == "tiny" else set())  # the others have list recall in E1
    assert all(cost.to_do == cost.trainings > 0 and cost.hours > 0 for cost in costs.values())
    assert not (tmp_path / "out").exists()


def test_contrasts_are_the_same_at_every_scale() -> None:
    texts = [(load_scale(name).folder / "contrasts.yaml").read_text().partition("contrasts:")[2] for name in SCALES]
    assert texts == texts[:1] * len(texts)


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
