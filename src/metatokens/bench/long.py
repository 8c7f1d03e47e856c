"""How fast does a model write behind a long text, and what does it take to read it: memory mode and full attention.

Every contender reads the same text in chunks once, and writes some more in each turn, from where it stood. Reading is
measured apart, in a process for each contender and size of the chunks: its seconds, and its peak beyond the model. The
limit of decoding is the rate of reading over the bytes of the weights and of the cache, which each step needs once.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from metatokens.bench.generation import bytes_of_cache
from metatokens.bench.long_contenders import LONG, Writer, draw_text, make_plan, read_in_chunks
from metatokens.bench.machine import describe_machine
from metatokens.bench.measuring import BenchResult, Contender, Pair, Ratio, Work, measure, quiet, set_threads
from metatokens.bench.processes import bytes_of_process, run_apart
from metatokens.bench.turns import ratio, spread, take_turns, timed
from metatokens.config.bench import LongBench
from metatokens.errors import UsageError
from metatokens.evaluation.long_context.peak import peak_memory
from metatokens.model.accounting import cache_bytes, count_parameters

REGISTRY = LONG
PAIRS = (
    Pair("full", "memory"),
    Pair("full_pause", "memory_pause"),
    Pair("static_pause", "memory_pause"),
    Pair("static_pause", "memory"),
)
DECODE = "decode"


def run(settings: LongBench, say: Callable[[str], None] = quiet) -> BenchResult:
    """Measure; `say` is told of the progress."""
    names, not_run = LONG.choose(settings.contenders)
    set_threads(settings)
    machine = describe_machine(settings.device)
    plan = make_plan(settings)
    prefills = _measure_prefills(names, settings, say)
    contenders = {}
    for name in names:
        say(f"{name} reads {plan.read * (plan.every + 1):,} positions")
        contenders[name] = contend(Writer(LONG[name](settings), plan, settings.chunks[0]))
    result = measure("long", settings, LONG, contenders, pairs=PAIRS, not_run=not_run, say=say)
    ratios = [
        Ratio(part, above, below, figure, figure)
        for above, below in PAIRS
        if above in prefills and below in prefills
        for part, values in prefills[above].items()
        for figure in [ratio(values, prefills[below][part])]
    ]
    facts = {
        name: result.facts[name]
        | {part: round(spread(values).median, 3) for part, values in prefills.get(name, {}).items()}
        for name in names
    }
    rounds = {name: result.rounds[name] | prefills.get(name, {}) for name in names}
    return replace(result, machine=machine, ratios=[*result.ratios, *ratios], facts=facts, rounds=rounds)


def contend(writer: Writer) -> Contender:
    """Return the turn of a writer, what it has to do, and the bytes of its cache beside those of the formula."""
    plan, config, size = writer.plan, writer.model.config, writer.model.dtype.itemsize
    num_positions = writer.ids.shape[1]
    found = bytes_of_cache(writer.cache)
    formula = cache_bytes(config, num_positions=num_positions, num_meta=plan.read, bytes_per_number=size)
    parameters = count_parameters(config)
    weights = size * (parameters.embedding + parameters.blocks)
    text = plan.written * plan.every
    needed = text * (weights + formula.text + formula.anchors)
    needed += plan.written * (size * parameters.meta_attention + formula.meta_attention)
    return Contender(
        lambda: {DECODE: timed(writer.write)},
        {DECODE: Work(text, text + plan.written, read_bytes=needed)},
        {"positions": num_positions, **found, "cache_bytes": sum(found.values()), "formula_bytes": formula.total},
    )


def measure_prefill(name: str, fields: Mapping[str, Any], chunk: int) -> dict[str, float]:
    """Read the text in this process: the seconds, and the peak beyond the model. It must have read nothing before."""
    settings = LongBench(**fields)
    set_threads(settings)
    model, plan = LONG[name](settings).model, make_plan(settings)
    ids = draw_text(plan, settings.vocabulary).to(model.device)
    before = bytes_of_process(settings.device, "VmRSS")
    with peak_memory(model.device) as peak:
        seconds = timed(lambda: read_in_chunks(model, ids, chunk))
    if peak.num_bytes is None:
        found = "a system that keeps no such figure"
        raise UsageError("the peak of reading", expected="one that can be reset", found=found, remedy="--prefills 0")
    return {f"prefill_{chunk}_seconds": seconds, f"prefill_{chunk}_peak_bytes": peak.num_bytes - before}


def _measure_prefills(names: list[str], settings: LongBench, say: Callable[[str], None]) -> Any:
    """Return the figures of each round, by contender and part; how one decodes does not matter here."""
    if not settings.prefills:
        return {}
    fields = settings.model_dump(mode="json")

    def read(name: str) -> Mapping[str, float]:
        say(f"{name} reads in processes of its own")
        return {
            part: value
            for chunk in settings.chunks
            for part, value in run_apart(measure_prefill, name, fields, chunk).items()
        }

    turns = {name: partial(read, name) for name in names if not name.startswith("static")}
    return take_turns(turns, rounds=settings.prefills, warmup=0)
