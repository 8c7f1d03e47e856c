"""The demonstration at a small size: it tells its story, keeps what it has made, and goes on where it was."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from commands import metatokens
from metatokens.demo import Copying, CopyingArm, Example
from metatokens.evaluation.recall import RecallRow
from metatokens.evaluation.statistics import wilson_interval
from metatokens.report.demo_story import show_copying

SMALL = ("--text-tokens", "10000", "--recall-steps", "3")


@pytest.mark.slow
@pytest.mark.long
def test_the_demonstration_tells_its_story_and_a_second_run_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("demo", *SMALL)
    shown = metatokens(*command)
    chapters = re.findall(r"^(.+) -{20,}$", shown.stdout, re.MULTILINE)
    assert chapters == ["1 Copying", "2 Reading", "3 Inside", "Go on"]
    waits = [line for line in shown.stderr.splitlines() if line.endswith("...")]
    assert len(waits) == 8
    assert "A trial" in shown.stderr
    assert "seven" not in shown.stderr
    assert all("about" in line for line in waits)
    assert max(map(len, [*shown.stdout.splitlines(), *shown.stderr.splitlines()])) <= 80

    made = {path: path.read_bytes() for path in (tmp_path / "demo/report").rglob("*") if path.is_file()}
    assert {"results.json", "arrays.npz", "report.html"} <= {path.name for path in made}
    again = metatokens(*command, "--json")
    assert not {"Encoding", "Analysing"} & set(again.stderr.split())
    assert {path: path.read_bytes() for path in made} == made
    result = json.loads(again.stdout)
    plain, meta = result["reading"]["plain"], result["reading"]["meta"]
    assert plain["text_tokens"] == meta["text_tokens"]
    assert meta["parameters"] - plain["parameters"] == 4 * (4 * 128 * 128 + 4 * 128)
    assert meta["perplexity"]["low"] < meta["perplexity"]["high"]
    assert AutoModelForCausalLM.from_pretrained(meta["model"]).num_parameters() == meta["parameters"]
    assert result["inside"]["page"] == "demo/report/report.html"


def arm(name: str, right: int, **changed: int) -> CopyingArm:
    def rows(right: int) -> tuple[RecallRow, ...]:
        accuracy = wilson_interval(right, 100)
        asked = ("copying", "17-32", (2, 4), (17, 32), "task", (), 100, 1, 0.05)
        return (
            RecallRow(
                *asked, token_accuracy=accuracy, sequence_accuracy=accuracy, token_outcomes=(), sequence_outcomes=()
            ),
        )

    return CopyingArm(name, "", 1, 1.0, rows(right), {key.replace("_", " "): rows(n) for key, n in changed.items()})


def story(capsys: pytest.CaptureFixture[str], *, zeroed: int, off: int, right: int = 100, answer: str = "camel") -> str:
    arms = (
        arm("meta-attention", right, **{"meta-tokens_zeroed": zeroed, "meta-attention_off": off}),
        arm("pause tokens", right, **{"meta-tokens_zeroed": zeroed}),
    )
    show_copying(Copying(32, Example("Text:_ [ moth_ ] camel. Copy 1:", "moth", "moth", answer), arms))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    return " ".join(shown.split())


def test_the_story_says_what_the_numbers_say_and_no_more(capsys):
    marks = story(capsys, zeroed=1, off=100)
    assert "as trained moth <- right" in marks
    assert "meta-tokens zeroed camel <- wrong" in marks
    assert "camel camel <- wrong" in story(capsys, zeroed=1, off=100, answer=" ".join(["camel"] * 20))
    assert "takes accuracy from 100% to 1%" in marks
    assert "serve as place marks" in marks
    assert "their attention to one another" in story(capsys, zeroed=1, off=2)
    assert "has not made the model depend" in story(capsys, zeroed=97, off=98)
    assert "Nothing: no model has learned" in story(capsys, zeroed=0, off=0, right=0)
