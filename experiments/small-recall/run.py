"""Recall, zeroed meta-tokens and longer windows, from books to tables, on one GPU in about half an hour.

Pre-trains four arms on Project Gutenberg books, fine-tunes each on list recall, zeroes position and embedding at the
meta-tokens (the layout of the paper's Table 2), extends the meta-token model by 4 and by 8 with YaRN and fine-tunes it
to longer lists (the layout of Table 1). Every step is a command of the package; the JSON holds them all. The numbers of
steps follow from the time: each kind of training is first tried for some steps. The plan is kept, so that a run that
was cut off continues where it stopped.

    python experiments/small-recall/run.py --books BOOKS --tokenizer GPT2 --work WORK \
        --out experiments/small-recall/results.json
"""

import argparse
import contextlib
import gzip
import io
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metatokens.cli import main as metatokens
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset

ARMS = ("meta", "meta-learned", "pause", "plain")
ZEROED = ("meta", "meta-learned")  # the arms of Table 2: meta-attention with RoPE and with learned positions
FACTORS = (4, 8)
# share of the time for all runs of a kind; the rest is for trials, evaluation and saving
SHARES = {"pretrain": 0.3, "recall": 0.2, "extend": 0.08, "long": 0.2}
TRIED_STEPS = 8
TRAINING_KEYS = ("num_parameters", "steps", "text_tokens", "meta_tokens", "training_flops", "final_loss", "validation")


@dataclass(frozen=True)
class Scale:
    """The presets of a scale."""

    window: int
    recall: str
    long: dict[int, str]
    """Keys are the multiples of the window that a model is fine-tuned to."""


SCALES = {
    "tiny": Scale(256, "tiny/recall-256", {2: "tiny/recall-512", 4: "tiny/recall-1k", 8: "tiny/recall-2k"}),
    "small": Scale(1024, "small/recall", {2: "small/recall-2k", 4: "small/recall-4k", 8: "small/recall-8k"}),
}
# Table 1 of the paper: (factor of the extension, multiple of the window that the model is fine-tuned to)
LONG_RUNS = ((4, 2), (4, 4), (8, 4), (8, 8))


class Commands:
    """Runs commands of the package in this process, and keeps each as a reader would type it."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.said: list[dict[str, Any]] = []
        self._places = places

    def run(self, *arguments: Any) -> Any:
        words = [str(argument) for argument in arguments]
        said = "metatokens " + " ".join(f"'{word}'" if " " in word else word for word in words)
        print(said, file=sys.stderr, flush=True)
        out, started = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(out):
            code = metatokens([*map(self._fill, words), "--json"])
        if code:
            sys.exit(code)
        self.said.append({"command": said, "seconds": round(time.perf_counter() - started, 1)})
        return json.loads(out.getvalue())

    def _fill(self, argument: str) -> str:
        for name, path in self._places.items():
            if argument == name or argument.startswith(f"{name}/"):
                return str(path) + argument.removeprefix(name)
        return argument


class Experiment:
    """The runs, in the order in which they are made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.scale = options, SCALES[options.scale]
        self.commands = Commands({"WORK": options.work, "GPT2": options.tokenizer})
        self.plan: dict[str, Any] = {}

    # Each kind of training ---------------------------------------------------------------------------------------

    def pretrain(self, arm: str, out: str, steps: int) -> Any:
        return self.commands.run(
            *("pretrain", f"{self.options.scale}/{arm}", "--data.path", "WORK/tokens", "--out", out),
            *("--training.duration", f"{{kind: steps, steps: {steps}}}", "--evaluation.interval_steps", steps),
            *("--schedule.warmup_steps", min(200, steps // 5), *self.batch(), *self.validation()),
        )

    def extend(self, start: str, factor: int, out: str, steps: int) -> Any:
        warmup = min(20, steps // 5)
        return self.commands.run(
            *("extend", start, "--method", "yarn", "--factor", factor, "--preset", f"{self.options.scale}/extend"),
            *("--data.path", "WORK/tokens", "--out", out, "--training.duration.steps", steps),
            *("--schedule.warmup_steps", warmup, "--schedule.decay_steps", steps - warmup),
            *("--evaluation.interval_steps", steps, *self.batch(), *self.validation()),
        )

    def finetune(self, preset: str, start: str, out: str, share: float, *more: Any) -> Any:
        """Fine-tune through the stages of a preset, each with a share of its steps."""
        stages = [
            {"steps": steps, "size": list(stage.size), "prompt_tokens": list(stage.prompt_tokens)}
            for stage, steps in zip(curriculum(preset), scaled_steps(preset, share), strict=True)
        ]
        total = sum(stage["steps"] for stage in stages)
        return self.commands.run(
            *("finetune", preset, "--start.path", start, "--out", out, "--curriculum", json.dumps(stages), *more),
            *("--schedule.warmup_steps", min(100, total // 5), "--evaluation.interval_steps", "null", *self.batch()),
        )

    def batch(self) -> tuple[Any, ...]:
        rows = self.options.batch_blocks
        return ("--training.batch_blocks", rows, "--training.micro_batch_blocks", rows) if rows else ()

    def validation(self) -> tuple[Any, ...]:
        return ("--evaluation.blocks", self.options.batch_blocks) if self.options.batch_blocks else ()

    def evaluate(self, run: str, name: str, *more: Any) -> list[dict[str, Any]]:
        """Return accuracies by length; earlier measurements are read, not repeated."""
        path = self.options.work / "evaluations" / f"{name}.json"
        if not path.exists():
            instances = ("--instances", self.options.instances) if self.options.instances else ()
            self.commands.run("evaluate", run, "--out", f"WORK/evaluations/{name}.json", *instances, *more)
        keys = ("length", "size", "instances", "interventions", "token_accuracy", "sequence_accuracy")
        return [{key: row[key] for key in keys} for row in json.loads(path.read_text())["rows"]]

    # The plan ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        options = self.options
        if not (options.work / "tokens" / "manifest.json").exists():
            write_bodies(options.books, options.work / "books", options.max_books)
            self.commands.run("prepare", "WORK/books", "--out", "WORK/tokens", "--tokenizer", "GPT2")

    def make_plan(self) -> None:
        """Read the plan, or try each kind of training for some steps and plan what fits into the time."""
        path = self.options.work / "plan.json"
        names = ("scale", "minutes", "arms", "batch_blocks", "instances", "max_books")
        settings = {name: getattr(self.options, name) for name in names}
        if path.exists():
            self.plan = json.loads(path.read_text())
            if self.plan["settings"] != settings:
                sys.exit(f"{path}: planned for {self.plan['settings']}, not {settings}; take another --work")
            return
        tried, scale = "WORK/tried", self.scale
        seconds = {"pretrain": seconds_of_a_step(self.pretrain("meta", f"{tried}/meta", TRIED_STEPS))}
        few = 1 / min(stage.steps for preset in scale.long.values() for stage in curriculum(preset))
        seconds["recall"] = seconds_of_a_step(
            self.finetune(scale.recall, f"{tried}/meta", f"{tried}/recall", few, *self.of_task("list_recall"))
        )
        for factor in FACTORS:
            result = self.extend(f"{tried}/meta", factor, f"{tried}/extended-{factor}", TRIED_STEPS)
            seconds[f"extend-{factor}"] = seconds_of_a_step(result)
        for multiple, preset in scale.long.items():
            factor = min(factor for factor in FACTORS if factor >= multiple)
            result = self.finetune(preset, f"{tried}/extended-{factor}", f"{tried}/long-{multiple}", few)
            seconds[f"long-{multiple}"] = seconds_of_a_step(result)
        steps = self.lay_out(seconds)
        self.plan = {"settings": settings, "seconds_of_a_step": seconds, "steps": steps}
        path.write_text(json.dumps(self.plan, indent=1) + "\n")

    def lay_out(self, seconds: dict[str, float]) -> dict[str, float]:
        """Return the steps of each kind of run, or the share of its preset's steps, that fit; at most its preset's."""
        options, arms = self.options, self.options.arms
        num_recall = len(arms) + len([arm for arm in ZEROED if arm in arms])

        def fitting(share: str, runs: int, kind: str) -> float:
            return SHARES[share] * options.minutes * 60 / runs / seconds[kind]

        most = load_preset(f"{options.scale}/meta").total_steps
        plan: dict[str, float] = {"pretrain": int(max(5, min(most, fitting("pretrain", len(arms), "pretrain"))))}
        plan["recall"] = min(1.0, fitting("recall", num_recall, "recall") / total_steps(self.scale.recall))
        most = load_preset(f"{options.scale}/extend").total_steps
        for factor in FACTORS:
            plan[f"extend-{factor}"] = int(max(5, min(most, fitting("extend", len(FACTORS), f"extend-{factor}"))))
        for multiple, preset in self.scale.long.items():
            plan[f"long-{multiple}"] = min(
                1.0, fitting("long", len(LONG_RUNS), f"long-{multiple}") / total_steps(preset)
            )
        return plan

    @staticmethod
    def of_task(kind: str) -> tuple[str, ...]:
        return ("--task", f"{{kind: {kind}, questions: 4}}")

    # The tables --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        self.prepare()
        self.make_plan()
        steps, arms = self.plan["steps"], self.options.arms
        training = {arm: self.pretrain(arm, f"WORK/runs/{arm}", steps["pretrain"]) for arm in arms}
        recall = {arm: self.recall(arm, "list_recall") for arm in arms}
        zeroing = [row for arm in arms if arm in ZEROED for row in self.zero(arm)]
        extension = self.extension_table() if "meta" in arms else []
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        return {
            "question": "do meta-tokens help recall after pre-training on books, what does zeroing at them do, and how "
            "far does a model with a longer window recall?",
            "command": "python experiments/small-recall/run.py " + " ".join(sys.argv[1:]),
            "machine": {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__},
            "minutes_taken_by_this_start": round((time.perf_counter() - started) / 60, 1),
            "plan": self.plan,
            "commands": self.commands.said,
            "pre_training": {arm: {key: result[key] for key in TRAINING_KEYS} for arm, result in training.items()},
            "recall": recall,
            "zeroing_table": zeroing,
            "extension_table": extension,
        }

    def recall(self, arm: str, task: str) -> list[dict[str, Any]]:
        """Fine-tune an arm within its window and return its accuracies."""
        run = f"WORK/runs/{task}-{arm}"
        self.finetune(self.scale.recall, f"WORK/runs/{arm}", run, self.plan["steps"]["recall"], *self.of_task(task))
        return self.evaluate(run, f"{task}-{arm}")

    def zero(self, arm: str) -> list[dict[str, Any]]:
        """Return the rows of Table 2: list pointer, whole, and with position or embedding zeroed at the meta-tokens."""
        whole = self.recall(arm, "list_pointer")
        run = f"WORK/runs/list_pointer-{arm}"
        position, embedding = (
            self.evaluate(run, f"list_pointer-{arm}-{kind}", "--intervention", kind)
            for kind in ("zero_position", "zero_embedding")
        )
        return [
            {
                "model": arm,
                "length": rows[0]["length"],
                "full": rows[0]["sequence_accuracy"],
                "zeroed_position": rows[1]["sequence_accuracy"],
                "zeroed_embedding": rows[2]["sequence_accuracy"],
            }
            for rows in zip(whole, position, embedding, strict=True)
        ]

    def extension_table(self) -> list[dict[str, Any]]:
        """Return the rows of Table 1: the window, the length that it was fine-tuned to, accuracy by length."""
        steps, window = self.plan["steps"], self.scale.window
        training = {
            factor: self.extend("WORK/runs/meta", factor, f"WORK/runs/extended-{factor}", steps[f"extend-{factor}"])
            for factor in FACTORS
        }
        rows = []
        for factor, multiple in LONG_RUNS:
            name, start = f"extended-{factor}-long-{multiple}", f"WORK/runs/extended-{factor}"
            self.finetune(self.scale.long[multiple], start, f"WORK/runs/{name}", steps[f"long-{multiple}"])
            accuracies = self.evaluate(f"WORK/runs/{name}", name)
            rows.append(
                {
                    "original_window": window,
                    "window": factor * window,
                    "fine_tuned_to": multiple * window,
                    "validation_loss_after_extension": training[factor]["validation"],
                    "accuracy": {row["length"]: row["sequence_accuracy"] for row in accuracies},
                }
            )
        return rows


def write_bodies(books: Path, folder: Path, max_books: int | None) -> None:
    """Write the training books without the Gutenberg header and licence as text files."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = json.loads((books / "manifest.json").read_text())["books"]
    for entry in [entry for entry in entries if not entry["in_pg19_test"]][:max_books]:
        text = gzip.decompress((books / entry["file"]).read_bytes()).decode("utf-8")
        name = Path(entry["file"]).name.removesuffix(".gz")
        (folder / name).write_text(text[entry["body_start"] : entry["body_end"]], encoding="utf-8")


def curriculum(preset: str) -> Any:
    return load_preset(preset, schema=FinetuneConfig).curriculum


def total_steps(preset: str) -> int:
    return load_preset(preset, schema=FinetuneConfig).total_steps


def scaled_steps(preset: str, share: float) -> list[int]:
    return [max(1, round(stage.steps * share)) for stage in curriculum(preset)]


def seconds_of_a_step(result: dict[str, Any]) -> float:
    """Return the mean over a run, its slow first step included."""
    return float(result["text_tokens"] / result["text_tokens_per_second"] / result["steps"])


def show(report: dict[str, Any]) -> str:
    """Return the tables as Markdown."""

    def percent(interval: dict[str, Any] | None) -> str:
        if interval is None:
            return "n/a"
        low, high = (f"{100 * interval[key]:.1f}" for key in ("low", "high"))
        return f"{100 * interval['estimate']:.1f} ({low} to {high})"

    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]

    lines = ["Share of whole answers that are right, percent (95% interval)", ""]
    recall = report["recall"]
    lengths = [row["length"] for row in next(iter(recall.values()))]
    rows = [[arm, *(percent(row["sequence_accuracy"]) for row in rows)] for arm, rows in recall.items()]
    lines += table(["list recall", *lengths], rows)
    rows = [
        [row["model"], row["length"], *(percent(row[key]) for key in ("full", "zeroed_position", "zeroed_embedding"))]
        for row in report["zeroing_table"]
    ]
    lines += table(["list pointer", "length", "full", "zeroed position", "zeroed embedding"], rows)
    for row in report["extension_table"][:1]:
        head = ["original window", "window", "fine-tuned to", *row["accuracy"]]
        cells = [
            [
                *(str(row[key]) for key in ("original_window", "window", "fine_tuned_to")),
                *map(percent, row["accuracy"].values()),
            ]
            for row in report["extension_table"]
        ]
        lines += table(head, cells)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with manifest.json and the packed books")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the GPT-2 BPE")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--out", type=Path, required=True, help="file for the result as JSON")
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--minutes", type=float, default=30, help="time to plan for, without preparing the books")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch-blocks", type=int, help="rows of each batch, for small trials (default: the presets')")
    parser.add_argument("--instances", type=int, help="test instances of each row (default: the presets')")
    parser.add_argument("--max-books", type=int, help="train on at most this many books (default: all)")
    options = parser.parse_args()

    report = Experiment(options).run()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(show(report))


if __name__ == "__main__":
    main()
