"""experiments/tiny-memory."""

from functools import partial
from typing import Any

from measured.source import load, percent, span, table

MEMORY = "experiments/tiny-memory"


def memory_pilots() -> str:
    rows = []
    for pilot in load(f"{MEMORY}/pilots.json")["pilots"]:
        own = pilot["settings"]
        rows.append(
            [
                f"{own['span']} of {own['symbols']}, {own['distance']} between",
                own["reveal"],
                f"{own['positions']}, {own['rope_theta']:,}" if "rope_theta" in own else own["positions"],
                f"{own['mlp']}, {own['activation']}",
                str(own["batch"]),
                f"{pilot['steps'][-1]:,}",
                percent(pilot["words_right"][-1]),
                f"{pilot['cpu_seconds'][-1]:.0f}",
            ]
        )
    header = ["words", "reveal", "positions", "MLP", "batch", "steps", "words right", "CPU-seconds"]
    return table(header, rows)


def memory_recall_pilots() -> str:
    rows = []
    for one in load(f"{MEMORY}/pilots.json")["recall"]["tries"]:
        own = one["settings"]
        settings = f"{own['positions']}, {own['heads']} heads, std {own['initializer_range']:g}"
        rows.append(
            [
                f"{own['pairs']} of {own['words']}, {own['between']} between",
                f"`{own['text']}`, `{own['question']}`, {own['asked']}",
                settings if own["tied"] else f"{settings}, untied",
                f"{own['learning_rate']:g}, {own['batch']}",
                f"{one['steps'][-1]:,}",
                percent(one["answers_right"][-1]),
                percent(one["guess"]),
                f"{one['cpu_seconds']:.0f}",
            ]
        )
    header = ["pairs", "text and question", "model", "rate, batch", "steps", "answers right", "a guess", "CPU-seconds"]
    return table(header, rows)


def memory_pilot(row: int, step: int) -> str:
    """Return the share of words that a pilot had right at a step."""
    pilot = load(f"{MEMORY}/pilots.json")["pilots"][row]
    return percent(pilot["words_right"][pilot["steps"].index(step)])


MEMORY_ARMS = ("window", "sinks", "same-cache", "every", "pause", "meta", "meta-equal-bytes", "pooled", "full")


def _memory_runs(*sweeps: str) -> dict[tuple[str, int], Any]:
    """Return the trainings of some sweeps by arm and seed."""
    known = [one for name in ("runs", "earlier") for one in load(f"{MEMORY}/{name}.json")["runs"]]
    return {(one["arm"], one["seed"]): one for one in known if one["sweep"] in sweeps}


def memory_runs(*sweeps: str) -> str:
    runs = _memory_runs(*sweeps)
    seeds = sorted({seed for _, seed in runs})

    def cell(arm: str, seed: int) -> str:
        one = runs.get((arm, seed))
        if one is None:
            return "not run"
        at = f"{one['evaluated_at'][-1]:,}"
        return {"solved": f"solved at {at}", "censored": percent(one["words_right"][-1])}.get(
            one["state"], f"{percent(one['words_right'][-1])} at {at}, {one['state']}"
        )

    arms = [arm for arm in MEMORY_ARMS if arm in {arm for arm, _ in runs}]
    return table(
        ["arm", *(f"seed {seed}" for seed in seeds)], [[arm, *(cell(arm, seed) for seed in seeds)] for arm in arms]
    )


def memory_words(arm: str, seed: int = 0, sweep: str = "copying") -> str:
    """Return the share of words right at the last evaluation of a training."""
    return percent(_memory_runs(sweep)[arm, seed]["words_right"][-1])


def memory_range(arm: str, sweep: str = "copying") -> str:
    """Return the lowest and the highest share of words right at the last evaluation of an arm's trainings."""
    shares = [one["words_right"][-1] for (name, _), one in _memory_runs(sweep).items() if name == arm]
    return f"{100 * min(shares):.0f} to {percent(max(shares))}"


def memory_solved(arm: str, sweep: str = "copying") -> int:
    """Return how many trainings of an arm reached the endpoint."""
    return sum(one["state"] == "solved" for (name, _), one in _memory_runs(sweep).items() if name == arm)


def memory_gaps(first: str, second: str, sweep: str = "copying", step: int | None = 2000) -> str:
    """Return by how many points two arms differ in words right at a step or, for None, at the last, seed by seed."""
    runs = _memory_runs(sweep)

    def right(arm: str, seed: int) -> float:
        one = runs[arm, seed]
        return 100 * float(one["words_right"][-1 if step is None else one["evaluated_at"].index(step)])

    seeds = sorted(seed for arm, seed in runs if arm == first and (second, seed) in runs)
    return ", ".join(f"{right(first, seed) - right(second, seed):+.0f}" for seed in seeds)


def _books_of_memory(arm: str) -> Any:
    cells = load(f"{MEMORY}/books.json")["cells"]
    return next(one for one in cells if one["labels"]["arm"] == arm)["perplexities"][0]


def memory_books() -> str:
    """Return nats per word of test books under each arm, and the differences from `every`."""
    rows = []
    for arm in MEMORY_ARMS:
        own = _books_of_memory(arm)
        difference = "" if own["difference"] is None or arm == "every" else span(own["difference"], "+.3f")
        seeds = "" if arm == "every" else ", ".join(f"{one:+.3f}" for one in own["difference_by_seed"])
        rows.append([arm, span(own["nats_per_word"], ".2f"), difference, seeds])
    return table(["arm", "nats per word", "minus `every`", "seed by seed"], rows)


def memory_books_at(arm: str, lowest: int) -> float:
    """Return the nats per token of an arm after at least `lowest` tokens of context, and fewer than twice that."""
    contexts = _books_of_memory(arm)["by_context"]
    return float(next(one["nats_per_token"] for one in contexts if one["lowest"] == lowest))


def memory_books_minus(arm: str) -> Any:
    """Return the nats per word of an arm minus those of `every`."""
    return _books_of_memory(arm)["difference"]


TABLES = {
    "memory-pilots": memory_pilots,
    "memory-recall-pilots": memory_recall_pilots,
    "memory-runs": partial(memory_runs, "copying", "narrower"),
    "memory-controls": partial(memory_runs, "controls"),
    "memory-books": memory_books,
}
NAMES = (
    memory_words,
    memory_pilot,
    memory_range,
    memory_solved,
    memory_gaps,
    memory_books_minus,
    memory_books_at,
)
