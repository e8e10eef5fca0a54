"""Charts of the figures with matplotlib (extra ``bench``), each as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qingyu.bench.page import CHARTS
from qingyu.bench.summary import is_ours
from qingyu.models.extras import require

__all__ = ["draw"]

Figures = Mapping[str, Any]
Axes = Any  # matplotlib's, which has no types of its own for all that is used here

MODEL = "bge-small-zh"
OURS, THEIRS, CEILING = "#c2410c", "#64748b", "#111827"
COLOURS = ("#64748b", "#0f766e", "#7c3aed", "#2563eb", "#a16207", "#be185d", "#15803d", "#475569", "#9333ea")
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "qingyu",  # ids in the file are then the same every time
    "svg.fonttype": "none",
    "figure.dpi": 110,
}


def draw(figures: Figures, folder: Path) -> list[str]:
    """Write every chart that there are figures for; their names. Raises ``MissingExtraError`` without matplotlib."""
    require("bench", "matplotlib")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(SETTINGS):
        for name, plot in PLOTS.items():
            figure = plot(pyplot, figures)
            if figure is None:
                continue
            figure.suptitle(CHARTS[name], x=0.01, ha="left", fontweight="bold")
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=120)
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _colour(name: str, others: Sequence[str] = ()) -> str:
    if is_ours(name):
        return OURS
    return COLOURS[others.index(name) % len(COLOURS)] if name in others else THEIRS


def _most_cores(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    most = max((row["cores"] for row in rows), default=0)
    return [row for row in rows if row["cores"] == most]


def _throughput(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    rows = _most_cores([row for row in figures["bulk"] if row["model"] == MODEL])
    names = [name for name in ("short", "mixed", "documents") if any(row["workload"] == name for row in rows)]
    if not names:
        return None
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(names),
        figsize=(4.0 + 2.6 * len(names), 1.2 + 0.28 * len(contenders)),
        sharey=True,
        squeeze=False,
    )
    for axis, name in zip(axes[0], names, strict=True):
        values = {row["contender"]: row for row in rows if row["workload"] == name}
        _bars(axis, contenders, {one: row["tokens_per_second"] for one, row in values.items()})
        _ceiling(axis, figures, rows[0]["cores"])
        axis.set_title(name)
        axis.set_xlabel("tokens a second")
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(5))
        axis.xaxis.set_major_formatter(_thousands)
    return figure


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g} k" if value else "0"


def _bars(axis: Axes, names: Sequence[str], spreads: Mapping[str, Mapping[str, float]]) -> None:
    """Bars to the median, with whiskers from the least to the most."""
    for place, name in enumerate(names):
        spread = spreads.get(name)
        if spread is None:
            continue
        median = spread["median"]
        whiskers = [[median - spread["least"]], [spread["most"] - median]]
        axis.barh(place, median, color=_colour(name), xerr=whiskers, ecolor="#9ca3af", height=0.7)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def _ceiling(axis: Axes, figures: Figures, cores: int) -> None:
    for wall in figures["wall"]:
        if wall["model"] == MODEL and wall["cores"] == cores and wall["engine"] is not None:
            need = figures["models"][MODEL]["operations_per_token"]
            axis.axvline(
                1e9 * wall["gops"][wall["engine"]]["median"] / need,
                color=CEILING,
                linestyle="--",
                linewidth=1,
            )


def _frontier(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    rows = _most_cores(
        [row for row in figures["bulk"] if row["model"] == MODEL and row["workload"] == "mixed"]
    )
    loss = {row["contender"]: 1 - row["centred_cosine"]["mean"] for row in figures["fidelity"]}
    shown = [row for row in rows if row["contender"] in loss and row["times_base"] is not None]
    if not shown:
        return None
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    points = sorted(
        (
            (row["tokens_per_second"]["median"], max(loss[row["contender"]], 1e-6), row["contender"])
            for row in shown
        ),
        reverse=True,
    )
    above: tuple[float, float] | None = None
    for y, x, names in _together(points, 0.01 * points[0][0]):
        axis.scatter(x, y, color=_colour(names[0]), zorder=3)
        # The right half is for FP32, whose labels would leave the chart; one close below another goes below its point.
        near = above is not None and above[0] - y < 0.06 * points[0][0] and 0.4 < above[1] / x < 2.5
        side, align = (5, "left") if x > 1e-5 else (-5, "right")
        place = (side, -10 if near else 4)
        axis.annotate(
            ", ".join(names), (x, y), xytext=place, textcoords="offset points", fontsize=8, ha=align
        )
        above = (y, x)
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("1 - centred cosine to FP32 with real weights; better to the right (FP32 itself at 1e-6)")
    axis.set_ylabel("tokens a second, mixed lengths")
    axis.yaxis.set_major_formatter(_thousands)
    return figure


def _together(
    points: Sequence[tuple[float, float, str]], near: float
) -> Iterator[tuple[float, float, list[str]]]:
    """(y, x, names) of points, most first; those that would be drawn over one another are one with several names.

    >>> list(_together([(9.0, 1.0, "a"), (8.9, 1.0, "b"), (3.0, 1.0, "c")], 0.5))
    [(9.0, 1.0, ['a', 'b']), (3.0, 1.0, ['c'])]
    """
    found: list[tuple[float, float, list[str]]] = []
    for y, x, name in points:
        if found and found[-1][1] == x and found[-1][0] - y <= near:
            found[-1][2].append(name)
        else:
            found.append((y, x, [name]))
    yield from found


def _latency(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    rows = [row for row in figures["latency"] if row["model"] == MODEL and row["workload"] == "single"]
    if not rows:
        return None
    others = [row["contender"] for row in rows if not is_ours(row["contender"])]
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    styles = iter(("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1))))
    for row in sorted(rows, key=lambda one: float(one["p50_ms"]["median"])):
        points = sorted((float(value), int(share)) for share, value in row["quantiles_ms"].items())
        name = row["contender"]
        style = next(styles) if is_ours(name) else "-"
        axis.plot(
            [value for value, _ in points],
            [share for _, share in points],
            color=_colour(name, others),
            linestyle=style,
            linewidth=2 if is_ours(name) else 1.2,
            label=name,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(pyplot.FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100]))
    axis.xaxis.set_minor_locator(pyplot.NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("milliseconds")
    axis.set_ylabel("percent of queries that took at most so long")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _scaling(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    growth = [row for row in figures["growth"] if row["model"] == MODEL]
    mixed = [row for row in figures["bulk"] if row["model"] == MODEL and row["workload"] == "mixed"]
    cores = sorted({row["cores"] for row in mixed})
    if not growth and len(cores) < 2:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    others = [row["contender"] for row in growth if not is_ours(row["contender"])]
    for row in growth:
        sizes = [point["texts"] for point in row["points"]]
        times = [point["ms_per_text"]["median"] for point in row["points"]]
        left.plot(sizes, times, marker="o", color=_colour(row["contender"], others), label=row["contender"])
    left.set_xscale("log")
    left.set_ylim(bottom=0)
    left.set_xlabel("texts")
    left.set_ylabel("milliseconds a text")
    left.legend(frameon=False, fontsize=7)
    _cores(right, mixed, cores)
    return figure


def _cores(axis: Axes, mixed: Sequence[Mapping[str, Any]], cores: Sequence[int]) -> None:
    one = {row["contender"]: row["tokens_per_second"]["median"] for row in mixed if row["cores"] == cores[0]}
    names = [row["contender"] for row in mixed if row["cores"] == cores[-1] and row["contender"] in one]
    if len(cores) < 2:
        axis.set_axis_off()
        return
    for place, name in enumerate(names):
        own = [
            row["tokens_per_second"]["median"]
            for count in cores
            for row in mixed
            if row["contender"] == name and row["cores"] == count
        ]
        axis.barh(place, own[-1], color=_colour(name), height=0.7, alpha=0.45)
        axis.barh(place, own[0], color=_colour(name), height=0.7)
        axis.annotate(
            f"{own[-1] / own[0]:.2f}",
            (own[-1], place),
            xytext=(3, -3),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(f"tokens a second, mixed lengths, {cores[0]} CPU (dark) and {cores[-1]}")


def _memory(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    rows = [row for row in figures["growth"] if row["model"] == MODEL and row["samples"]]
    if not rows:
        return None
    figure, axis = pyplot.subplots(figsize=(7.5, 4.2))
    others = [row["contender"] for row in rows if not is_ours(row["contender"])]
    for row in rows:
        texts = row["points"][-1]["texts"]
        axis.plot(
            [second for second, _ in row["samples"]],
            [size for _, size in row["samples"]],
            color=_colour(row["contender"], others),
            linewidth=2 if is_ours(row["contender"]) else 1.2,
            label=f"{row['contender']}, {texts:,} texts",
        )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("seconds")
    axis.set_ylabel("resident MB")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _cold(pyplot: Any, figures: Figures) -> Any:  # noqa: ANN401
    rows = [row for row in figures["cold"] if row["model"] == MODEL]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: float(row["milliseconds"]["median"]))
    figure, axis = pyplot.subplots(figsize=(7.5, 1.2 + 0.3 * len(rows)))
    names = [row["contender"] for row in rows]
    _bars(axis, names, {row["contender"]: row["milliseconds"] for row in rows})
    axis.set_xlabel("milliseconds, least to most")
    return figure


PLOTS: Mapping[str, Callable[[Any, Figures], Any]] = {
    "throughput": _throughput,
    "frontier": _frontier,
    "latency": _latency,
    "scaling": _scaling,
    "memory": _memory,
    "cold": _cold,
}
