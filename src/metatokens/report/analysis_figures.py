"""Figures of an analysis for papers, as PNG and PDF: one for each chart of the page, from the same records.

Equal results give equal bytes for equal versions of matplotlib. The colours are those of Okabe and Ito; intervals are
bands or bars, units stand on the axes, the number of documents in the caption.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metatokens.analysis.results import Record, Results, Section
from metatokens.report.figures import COLOURS, MARKERS

Arrays = Mapping[str, npt.NDArray[Any]]
Draw = Callable[[Results, Arrays], Figure]
IsDrawable = Callable[[Results, Arrays], bool]
SINGLE_COLUMN, DOUBLE_COLUMN = 3.5, 7.0
"""Widths in inches that journals set."""
FIGURE_KINDS = ("png", "pdf")
_DOTS_PER_INCH = 300
_PAGE_DOTS_PER_INCH = 110
_MOST_PANELS = 4
_DENOISE = "denoise"


@dataclass(frozen=True)
class AnalysisFigure:
    """What a figure shows."""

    title: str
    text: str
    """Of the caption, before the number of documents."""
    metrics: tuple[tuple[Section, str], ...]
    """Of its table; not all are drawn."""
    draw: Draw
    is_drawable: IsDrawable
    """Whether the records that the chart draws are there, and not only others of its table."""

    def caption(self, records: Sequence[Record]) -> str:
        """Return the caption with the number of documents."""
        counts = sorted({record.num_documents for record in records if record.value is not None})
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{self.text} n = {span} documents; 95% intervals."


def draw_figure(figure_id: str, results: Results, arrays: Arrays) -> bytes:
    """Return a figure as the PNG that the page shows without JavaScript."""
    return _save(FIGURES[figure_id].draw(results, arrays), "png", _PAGE_DOTS_PER_INCH)


def figure_files(results: Results, arrays: Arrays) -> dict[str, bytes]:
    """Return every figure that the results have numbers for, by file name, as PNG and as PDF."""
    files = {}
    for figure_id, figure in FIGURES.items():
        if figure.is_drawable(results, arrays):
            drawn = figure.draw(results, arrays)
            for kind in FIGURE_KINDS:
                files[f"{figure_id}.{kind}"] = _save(drawn, kind, _DOTS_PER_INCH)
    return files


def _save(figure: Figure, kind: str, dots_per_inch: int) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"CreationDate": None, "Creator": None, "Producer": None}
    with mpl.rc_context({"pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=dots_per_inch, metadata=metadata)
    return buffer.getvalue()


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for one in axes:
        one.tick_params(labelsize=7)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _present(results: Results, section: Section, metric: str, **at: str | float) -> list[Record]:
    return [record for record in results.find(section, metric, **at) if record.value is not None]


def _names(records: Sequence[Record], key: str) -> list[str]:
    """Return the values of a coordinate in the order of the records, so that the page has the same colours."""
    return list(dict.fromkeys(str(record.at[key]) for record in records))


def _drawn_from(section: Section, metrics: Sequence[str], *keys: str, **at: str) -> IsDrawable:
    def is_drawable(results: Results, arrays: Arrays) -> bool:
        del arrays
        records = (record for metric in metrics for record in _present(results, section, metric, **at))
        return any(all(key in record.at for key in keys) for record in records)

    return is_drawable


def _has_curves(results: Results, arrays: Arrays) -> bool:
    del arrays
    rates, distortions = (
        {(record.at.get("state"), record.at.get("beta")) for record in _present(results, "rate_distortion", metric)}
        for metric in ("rate", "distortion")
    )
    return any(None not in place for place in rates & distortions)


def _has_points(results: Results, arrays: Arrays) -> bool:
    del results
    return len(arrays.get("theory_points", ())) > 0


# One function a figure ---------------------------------------------------------------------------------------------


def _draw_maps(results: Results, arrays: Arrays) -> Figure:
    del arrays
    metrics = (
        ("entropy_drop", "Entropy drop, nats"),
        ("log_odds_boost", "Log-odds boost, nats"),
        ("meta_mass", "Meta mass"),
    )
    shown = [(m, t) for m, t in metrics if any("head" in r.at for r in _present(results, "attention", m))]
    figure, axes = _figure(DOUBLE_COLUMN, 2.4, len(shown))
    for axis, (metric, title) in zip(axes, shown, strict=True):
        records = [record for record in _present(results, "attention", metric) if "head" in record.at]
        layers, heads = (1 + max(int(record.at[key]) for record in records) for key in ("layer", "head"))
        values = np.full((layers, heads), np.nan)
        for record in records:
            values[int(record.at["layer"]), int(record.at["head"])] = record.value
            if record.adjusted_p is not None and record.adjusted_p <= 0.05:
                place = int(record.at["head"]), int(record.at["layer"])
                axis.plot(*place, "ko", markersize=2.5, markeredgecolor="w", markeredgewidth=0.5)
        most = float(np.nanmax(np.abs(values))) or 1.0
        signed = bool(np.nanmin(values) < 0)
        image = axis.imshow(
            values,
            origin="lower",
            aspect="auto",
            cmap="PuOr_r" if signed else "cividis",  # orange is positive, as on the page
            vmin=-most if signed else 0,
            vmax=most,
        )
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("head", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        axis.set_xticks(range(heads))
        axis.set_yticks(range(layers))
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    return figure


def _draw_theorem(results: Results, arrays: Arrays) -> Figure:
    del results
    figure, (axis,) = _figure(SINGLE_COLUMN * 1.3, 3.0)
    points = arrays.get("theory_points", np.zeros((0, 4)))
    margin, boost, critical = points[:, 1], points[:, 2], points[:, 3]
    kinds = (
        ("premise holds: falls", (boost > 0) & (margin >= 0), COLOURS[2]),
        ("beyond the critical boost: falls", (boost > critical) & (boost > 0) & (margin < 0), COLOURS[0]),
        ("below it: rises", (boost > 0) & (boost <= critical) & (margin < 0), COLOURS[1]),
        ("not boosted", boost <= 0, "#8b949e"),
    )
    for name, chosen, colour in kinds:
        axis.plot(margin[chosen], boost[chosen], ".", color=colour, markersize=2, label=name, alpha=0.6)
    lowest = float(margin.min(initial=0))
    limits = axis.get_ylim()
    axis.plot([lowest, 0], [-lowest, 0], "k--", linewidth=0.8, label="boost = |x|")
    axis.plot([lowest, 0], [-2 * lowest, 0], "k:", linewidth=0.8, label="boost = 2|x|")
    axis.set_ylim(limits)
    axis.axhline(0, color="k", linewidth=0.5)
    axis.axvline(0, color="k", linewidth=0.5)
    axis.set_xlabel("margin x without the embedding, nats", fontsize=8)
    axis.set_ylabel("boost, nats", fontsize=8)
    figure.legend(fontsize=6, frameon=False, markerscale=3, loc="outside upper center", ncols=3)
    return figure


def _draw_mechanism(results: Results, arrays: Arrays) -> Figure:
    del arrays
    figure, (axis,) = _figure(SINGLE_COLUMN, 2.4)
    for metric, name, style in (("mechanism", "by the meta keys' logits", 0), ("change", "whole change", 1)):
        _line(axis, [r for r in _present(results, "theory", metric) if "layer" in r.at], "layer", name, style)
    _finish(axis, "layer", "change of entropy, nats")
    return figure


def _draw_similarity(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [
        record for record in _present(results, "similarity", "cosine", form="centred") if "distance" in record.at
    ]
    figure, axes = _draw_panels(records, "distance", ("kind",), "layer", ("distance, tokens", "centred cosine"))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    return figure


def _draw_distances(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [r for r in _present(results, "attention", "mass_by_distance") if r.at.get("distance", 0)]
    figure, axes = _draw_panels(records, "distance", ("to",), "layer", ("distance, tokens", "attention mass"))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    return figure


def _draw_decodability(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [record for record in _present(results, "readouts", "decodability") if "layer" in record.at]
    return _draw_panels(records, "layer", ("state",), "window", ("layer", "held-out R\N{SUPERSCRIPT TWO}"))[0]


def _draw_logit_lens(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [record for record in _present(results, "readouts", "reciprocal_rank") if "distance" in record.at]
    return _draw_panels(records, "layer", ("state", "read"), "distance", ("layer", "mean reciprocal rank"))[0]


def _draw_panels(
    records: Sequence[Record], x: str, by: tuple[str, ...], panel: str, labels: tuple[str, str]
) -> tuple[Figure, list[Axes]]:
    """Draw lines by some coordinates in one panel for each value of another; of many values, some evenly spaced."""
    values = sorted({int(record.at[panel]) for record in records})
    if len(values) > _MOST_PANELS:
        values = [values[round(i * (len(values) - 1) / (_MOST_PANELS - 1))] for i in range(_MOST_PANELS)]
    figure, axes = _figure(DOUBLE_COLUMN, 2.4, max(1, len(values)), sharey=True)
    names = list(dict.fromkeys(tuple(str(record.at[key]) for key in by) for record in records))
    for axis, value in zip(axes, values, strict=True):
        of_panel = [record for record in records if record.at[panel] == value]
        for style, name in enumerate(names):
            chosen = [record for record in of_panel if tuple(str(record.at[key]) for key in by) == name]
            _line(axis, chosen, x, ", ".join(name), style)
        axis.set_title(f"{panel} {value}", fontsize=8)
        _finish(axis, labels[0], labels[1] if axis is axes[0] else "", legend=False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=6, frameon=False, loc="outside upper center", ncols=len(names)
    )
    return figure, axes


def _draw_rate_distortion(results: Results, arrays: Arrays) -> Figure:
    del arrays
    figure, (axis,) = _figure(SINGLE_COLUMN * 1.6, 2.8)
    rates = {(r.at["state"], r.at["beta"]): _value(r) for r in _present(results, "rate_distortion", "rate")}
    distortions = _present(results, "rate_distortion", "distortion")
    for style, state in enumerate(_names(distortions, "state")):
        chosen = [r for r in distortions if r.at["state"] == state and (state, r.at["beta"]) in rates]
        places = {rates[state, record.at["beta"]]: record for record in chosen}
        _draw_line(axis, sorted(places.items(), key=lambda place: place[0]), state, style)
    remaining = {record.at["state"]: record for record in _present(results, "probes", "remaining_entropy")}
    for style, state in enumerate(_names(distortions, "state")):
        if state in remaining:
            axis.axhline(_value(remaining[state]), color=COLOURS[style % len(COLOURS)], linestyle=":", linewidth=0.8)
    for record in _present(results, "rate_distortion", "label_entropy"):
        axis.axhline(_value(record), color="k", linestyle="--", linewidth=0.8, label="H(Y)")
    axis.set_xscale("function", functions=(_root, np.square))  # small rates are where states differ
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(8))
    _finish(axis, "rate, nats (root scale)", "distortion, nats", legend=False)
    figure.legend(fontsize=6, frameon=False, loc="outside right upper")
    return figure


def _root(rates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return roots; matplotlib asks for them a little below 0, too."""
    return np.sqrt(np.clip(rates, 0, None))


def _draw_bars(results: Results, section: Section, metric: str, keys: tuple[str, ...], label: str) -> Figure:
    records = [record for record in _present(results, section, metric) if all(key in record.at for key in keys)]
    figure, (axis,) = _figure(SINGLE_COLUMN * 1.3, 0.7 + 0.26 * len(records))
    places = range(len(records))
    axis.barh(list(places), [_value(record) for record in records], color=COLOURS[0], alpha=0.75, height=0.6)
    for place, record in zip(places, records, strict=True):
        if record.low is not None and record.high is not None:
            axis.plot([record.low, record.high], [place, place], "k-", linewidth=1.5)
    axis.set_yticks(list(places), [": ".join(str(record.at[key]) for key in keys) for record in records])
    axis.invert_yaxis()
    axis.axvline(0, color="k", linewidth=0.5)
    axis.set_xlabel(label, fontsize=8)
    return figure


def _draw_two_by_two(results: Results, arrays: Arrays) -> Figure:
    del arrays
    label = "logit of the answer minus the foil's"
    return _draw_bars(results, "causal", "logit_difference", ("condition",), label)


def _draw_zeroing(results: Results, arrays: Arrays) -> Figure:
    del arrays
    return _draw_bars(results, "causal", "accuracy", ("intervention",), "accuracy")


def _draw_probes(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [record for record in _present(results, "probes", "v_information") if "target" in record.at]
    targets, states = _names(records, "target"), _names(records, "state")
    figure, axes = _figure(DOUBLE_COLUMN, 0.9 + 0.18 * len(states), len(targets), sharey=True)
    for axis, target in zip(axes, targets, strict=True):
        for record in records:
            if record.at["target"] == target:
                place = states.index(str(record.at["state"]))
                axis.plot(_value(record), place, "o", color=COLOURS[0], markersize=3)
                if record.low is not None and record.high is not None:
                    axis.plot([record.low, record.high], [place, place], "-", color=COLOURS[0], linewidth=1.2)
        axis.set_yticks(range(len(states)), states)
        axis.axvline(0, color="k", linewidth=0.5)
        axis.set_title(target, fontsize=7)
    axes[0].invert_yaxis()
    figure.supxlabel("usable information, nats", fontsize=8)
    return figure


def _draw_attribution(results: Results, arrays: Arrays) -> Figure:
    del arrays
    labels = ("layer", "part of the logit")
    return _draw_lines(results, "readouts", "attribution", ("layer", "component"), labels)


def _draw_strengths(results: Results, arrays: Arrays) -> Figure:
    del arrays
    labels = ("layer", "length over that of the stream")
    return _draw_lines(results, "readouts", "branch_strength", ("layer", "branch"), labels)


def _draw_erasure(results: Results, arrays: Arrays) -> Figure:
    del arrays
    return _draw_lines(results, "probes", "erasure_loss", ("layer", "erased"), ("layer", "rise of the loss, nats"))


def _draw_capacity(results: Results, arrays: Arrays) -> Figure:
    del arrays
    figure, (axis,) = _figure(SINGLE_COLUMN, 2.4)
    _line(axis, [r for r in _present(results, "causal", "capacity") if "size" in r.at], "size", "accuracy", 0)
    _finish(axis, "size of the task", "accuracy", legend=False)
    return figure


def _draw_interchange(results: Results, arrays: Arrays) -> Figure:
    del arrays
    records = [record for record in _present(results, "causal", "interchange") if record.at.get("window", 1) == 1]
    directions = list(dict.fromkeys(str(record.at.get("direction", _DENOISE)) for record in records))
    figure, axes = _figure(SINGLE_COLUMN * 0.65 * (1 + len(directions)), 2.8, len(directions), sharey=True)
    for axis, direction in zip(axes, directions, strict=True):
        chosen = [record for record in records if record.at.get("direction", _DENOISE) == direction]
        for style, name in enumerate(_names(chosen, "where")):
            _line(axis, [record for record in chosen if record.at["where"] == name], "layer", name, style)
        axis.set_title("clean into corrupt" if direction == _DENOISE else "corrupt into clean", fontsize=8)
        _finish(axis, "layer", "share of the way" if axis is axes[0] else "", legend=axis is axes[0])
    return figure


def _draw_knockout(results: Results, arrays: Arrays) -> Figure:
    del arrays
    return _draw_lines(results, "causal", "knockout", ("layer", "mode"), ("layer", "rise of the loss, nats"))


def _draw_eviction(results: Results, arrays: Arrays) -> Figure:
    del arrays
    labels = ("share of the cache kept", "cost, nats per token")
    return _draw_lines(results, "eviction", "cost", ("kept", "policy"), labels)


def _draw_lines(
    results: Results, section: Section, metric: str, keys: tuple[str, str], labels: tuple[str, str]
) -> Figure:
    x, by = keys
    figure, (axis,) = _figure(SINGLE_COLUMN * 1.3, 2.8)
    records = [record for record in _present(results, section, metric) if x in record.at and by in record.at]
    for style, name in enumerate(_names(records, by)):
        _line(axis, [record for record in records if record.at[by] == name], x, name, style)
    _finish(axis, *labels)
    return figure


def _line(axis: Axes, records: Sequence[Record], x: str, name: str, style: int) -> None:
    places = [(float(record.at[x]), record) for record in records]
    _draw_line(axis, sorted(places, key=lambda place: place[0]), name, style)


def _draw_line(axis: Axes, places: Sequence[tuple[float, Record]], name: str, style: int) -> None:
    """Draw records at their places on the x axis, rising, with a band where they have intervals."""
    axis.plot([x for x, _ in places], [_value(record) for _, record in places], **_style(style), label=name)
    band = [(x, r.low, r.high) for x, r in places if r.low is not None and r.high is not None]
    if band:
        axis.fill_between(
            [x for x, _, _ in band],
            [low for _, low, _ in band],
            [high for _, _, high in band],
            color=COLOURS[style % len(COLOURS)],
            alpha=0.18,
            linewidth=0,
        )


def _value(record: Record) -> float:
    assert record.value is not None
    return record.value


def _style(number: int) -> dict[str, Any]:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.2}


def _finish(axis: Axes, x_label: str, y_label: str, *, legend: bool = True) -> None:
    axis.axhline(0, color="k", linewidth=0.5)
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    if x_label == "layer":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axis.legend(fontsize=6, edgecolor="none", framealpha=0.8)  # a line behind it must not strike it through


FIGURES: dict[str, AnalysisFigure] = {
    "attention-maps": AnalysisFigure(
        "Entropy drop, log-odds boost and mass on meta-tokens by head",
        "Means over the queries of a document, from its first meta-token on.",
        (
            *(("attention", metric) for metric in ("entropy_drop", "log_odds_boost", "max_score_boost")),
            *(("attention", metric) for metric in ("entropy", "meta_mass", "meta_lift")),
            *(("attention", metric) for metric in ("effective_keys", "entropy_without_sink")),
        ),
        _draw_maps,
        _drawn_from("attention", ("entropy_drop", "log_odds_boost", "meta_mass"), "layer", "head"),
    ),
    "distances": AnalysisFigure(
        "How far back attention looks",
        "Mass from each distance to the next, mean over heads and queries; the token itself is in the table alone.",
        (("attention", "mass_by_distance"),),
        _draw_distances,
        _drawn_from("attention", ("mass_by_distance",), "layer", "to", "distance"),
    ),
    "theorem": AnalysisFigure(
        "Where the theorem's premise holds",
        "A sample of the edges from queries to meta keys.",
        (("theory", "share_above"), ("theory", "share_beyond"), ("theory", "sign_agreement")),
        _draw_theorem,
        _has_points,
    ),
    "mechanism": AnalysisFigure(
        "How much of the change of entropy the theorem's mechanism makes",
        "With minus without the embedding, mean over rows; the mechanism changes the meta keys' logits alone.",
        (("theory", "mechanism"), ("theory", "change"), ("theory", "r_squared")),
        _draw_mechanism,
        _drawn_from("theory", ("mechanism", "change"), "layer"),
    ),
    "similarity": AnalysisFigure(
        "Centred cosine with earlier tokens by distance",
        "Meta-tokens and ordinary tokens at the same places of the same documents.",
        (
            ("similarity", "cosine"),
            ("similarity", "excess_cosine"),
        ),
        _draw_similarity,
        _drawn_from("similarity", ("cosine",), "layer", "distance", "kind", form="centred"),
    ),
    "decodability": AnalysisFigure(
        "What a linear map reads of the text before a state",
        "Held-out R\N{SUPERSCRIPT TWO} of the mean embedding of the last tokens, a panel for each number of tokens. "
        "The last one is the token before a meta-token itself.",
        tuple(("readouts", metric) for metric in ("decodability", "prefix_rank", "prefix_rank_chance", "cka")),
        _draw_decodability,
        _drawn_from("readouts", ("decodability",), "layer", "window", "state"),
    ),
    "logit-lens": AnalysisFigure(
        "What the model's own head reads of the text before a state",
        "Mean reciprocal rank of the text token so many before it, 1 where it is the most probable; read from the "
        "state as it is, or through an affine map to the final state that other documents were fitted by.",
        tuple(("readouts", metric) for metric in ("reciprocal_rank", "log_probability", "divergence")),
        _draw_logit_lens,
        _drawn_from("readouts", ("reciprocal_rank",), "layer", "distance", "state", "read"),
    ),
    "attribution": AnalysisFigure(
        "What each component adds to the logit",
        "Direct logit attribution: of a task the answer's logit over its foil's at the end of clean prompts, of text "
        "that of a token over the mean logit; embedding and biases, in the table, make up the rest of the sum.",
        (("readouts", "attribution"),),
        _draw_attribution,
        _drawn_from("readouts", ("attribution",), "layer", "component"),
    ),
    "branch-strength": AnalysisFigure(
        "How much each branch adds at meta-tokens",
        "Length of the addition over that of the residual stream between attention and feed-forward.",
        (("readouts", "branch_strength"),),
        _draw_strengths,
        _drawn_from("readouts", ("branch_strength",), "layer", "branch"),
    ),
    "rate-distortion": AnalysisFigure(
        "Rate and distortion of the answer, by state",
        "Held-out documents; a point is one beta, the mean over seeds of the head. Dashed: the label's entropy H(Y), "
        "which no rate at all leaves; dotted, in a state's colour: what a probe of it leaves, an upper estimate "
        "of H(Y|X).",
        (
            ("rate_distortion", "rate"),
            ("rate_distortion", "distortion"),
            ("rate_distortion", "label_entropy"),
            ("rate_distortion", "area"),
        ),
        _draw_rate_distortion,
        _has_curves,
    ),
    "probes": AnalysisFigure(
        "What a probe can use",
        "V-information of a state about a target, held out; 0 where it tells nothing.",
        tuple(
            ("probes", metric)
            for metric in (
                *("v_information", "selectivity", "remaining_entropy"),
                *("compression", "compression_of_prior", "compression_of_shuffled"),
            )
        ),
        _draw_probes,
        _drawn_from("probes", ("v_information",), "state", "target"),
    ),
    "erasure": AnalysisFigure(
        "The answer erased from the meta-tokens' states",
        "Rise of the loss on the answer when a linear eraser takes it out of what leaves a layer at meta-tokens, "
        "beside an eraser of shuffled labels. Where a probe found the answer before (in the table) and its erasure "
        "costs no more than that of shuffled labels, what the probe found there is not used.",
        tuple(("probes", f"erasure_{name}") for name in ("loss", "excess", "accuracy", "information")),
        _draw_erasure,
        _drawn_from("probes", ("erasure_loss",), "layer", "erased"),
    ),
    "zeroing": AnalysisFigure(
        "Accuracy with something taken from the meta-tokens",
        "At inference, on the same examples; none is the whole model.",
        (("causal", "accuracy"), ("causal", "accuracy_change")),
        _draw_zeroing,
        _drawn_from("causal", ("accuracy",), "intervention"),
    ),
    "two-by-two": AnalysisFigure(
        "Direct path and path through meta-tokens, cut and not",
        "Caching predicts that the answer survives the direct cut and not both.",
        (
            ("causal", "logit_difference"),
            ("causal", "meta_path"),
            ("causal", "interaction"),
            ("causal", "pair_accuracy"),
        ),
        _draw_two_by_two,
        _drawn_from("causal", ("logit_difference",), "condition"),
    ),
    "interchange": AnalysisFigure(
        "What the states of some tokens carry over",
        "States of one prompt put into the run of the other, 0 before the first block: the share of the way to its "
        "logit difference. Clean into corrupt asks whether they suffice, corrupt into clean whether they are needed.",
        (("causal", "interchange"),),
        _draw_interchange,
        _drawn_from("causal", ("interchange",), "layer", "where"),
    ),
    "knockout": AnalysisFigure(
        "Meta-attention removed, layer by layer",
        "Rise of the loss on the answer against the whole model.",
        (("causal", "knockout"),),
        _draw_knockout,
        _drawn_from("causal", ("knockout",), "layer", "mode"),
    ),
    "capacity": AnalysisFigure(
        "Recall by the task's own size",
        "Prompts of the same lengths; such as items of a list, which one meta-token ends.",
        (("causal", "capacity"),),
        _draw_capacity,
        _drawn_from("causal", ("capacity",), "size"),
    ),
    "eviction": AnalysisFigure(
        "Cost of a small cache, by what is kept",
        "Loss on a continuation with part of the prefix's cache minus with all of it.",
        (("eviction", "cost"),),
        _draw_eviction,
        _drawn_from("eviction", ("cost",), "kept", "policy"),
    ),
}
