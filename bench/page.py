"""docs/benchmarks.md from the figures, and from nothing else: the same JSON gives the same page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qingyu.bench.summary import BASE
from qingyu.bench.workloads import WORKLOADS

__all__ = ["CHARTS", "page", "quick_table"]

Figures = Mapping[str, Any]

# File -> what it shows.
CHARTS = {
    "throughput": "Tokens a second by workload; dashed: the ceiling of integer products",
    "frontier": "Speed against fidelity",
    "latency": "How long one query takes, one at a time",
    "scaling": "Time per text as texts grow in number, and what a second CPU gives",
    "memory": "Resident memory while texts are embedded",
    "cold": "From the start of a process to its first vector",
}

INTRODUCTION = """\
# Benchmarks

qingyu beside what one would use instead: the same weights, the same Chinese texts, the same machine, one process each,
in turn round by round. A program writes this page from [benchmarks.json](benchmarks.json); measure it anew with

```bash
pip install "qingyu[bench]"
python -m qingyu.bench compare --quick           # the main figures, in under five minutes
python -m qingyu.bench compare --out bench-out   # everything; can be split with --model and --workload
python -m qingyu.bench compare --out bench-out --only report
```

A contender that is not installed is listed with the pip command that brings it. `--checkpoint MODEL=FOLDER` gives
weights or a tokenizer, `--texts FILE` texts of yours instead of the sample in the package, `--python CONTENDER=FILE`
another environment for a contender. To measure one model of yours, and have what is best here used, see
[performance.md](performance.md).

The machine's speed drifts by a factor of two, so figures in seconds are medians of rounds, and every ratio is a median
of ratios within the same round, with the least and the most of them in brackets. *times* says how long a contender
takes for what qingyu INT8 with its defaults does in 1: more is slower.
"""


def page(figures: Figures) -> str:
    """The whole page."""
    parts = [INTRODUCTION, *_machine(figures), *_targets(figures)]
    for model in figures["models"]:
        parts += _model(figures, model)
    parts += [*_fidelity(figures), *_contenders(figures), *_skipped(figures), WORKLOAD_NOTES]
    return "\n".join(parts).rstrip() + "\n"


WORKLOAD_NOTES = """\
## What the workloads are

| workload | texts |
|---|---|
| short | queries of about 20 tokens, one call |
| mixed | log-normal lengths, median 48 tokens, mean 69, up to 512; one call, in random order |
| documents | 512 tokens each; one call |
| single | queries of about 20 tokens, a call each, one after the other |
| arrivals | the same, arriving at random 50 a second; each call takes all that wait; time counts from arrival |
| growth | 100 to 100,000 short queries, as a stream where the library has one; up and down again |
| cold | a fresh process, from its start to the vector of one query; files in the page cache |
| memory | a fresh process: one document, then 64 documents of 512 tokens in one call, then three seconds of nothing |

Larger models get proportionally fewer texts. Operations per token are those of the linear layers, two for each weight:
2 x layers x (4 x hidden x hidden + 2 x hidden x inner). Attention's own products and padding do not count as work. The
ceiling is that of bare integer products (MatMulInteger of onnxruntime, operands in cache, nothing between them; and
OpenVINO's, where installed) at the model's shapes, one thread a CPU, measured in the same rounds; shares are of the
faster of the two.

OpenVINO compiles kernels for each new shape of a batch. Rounds repeat the same texts, and its first pass is not timed:
contenders with OpenVINO, ours too, are shown as they are once they have seen all shapes.

Not measured here: other machines, ARM, energy, and anything over a network.
"""


def _machine(figures: Figures) -> Iterator[str]:
    machine = figures["machine"]
    dates = figures["dates"]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    flags = " ".join(machine["flags"])
    yield f"Measured {when} on {machine['cpus']} CPUs of {machine['cpu']} ({flags}),"
    yield f"{machine['system']}, Python {machine['python']}.\n"
    if figures["disturbed"]:
        yield f"{figures['disturbed']} measurements during which others used the machine, too, were left out.\n"
    if figures["note"]:
        yield figures["note"] + "\n"
    if figures["quick"]:
        yield "Some of it with `--quick`: fewer texts and rounds.\n"


def _targets(figures: Figures) -> Iterator[str]:
    rows = [
        [
            one["name"],
            ("at least " if one["at_least"] else "at most ") + f"{one['bound']:g}",
            "" if one["value"] is None else f"{one['value']:.2f}",
            {True: "met", False: "**not met**", None: "not measured"}[one["met"]],
            one["detail"],
        ]
        for one in figures.get("targets", [])
    ]
    if rows:
        yield "## What was aimed at, and reached\n"
        yield "With the shape of bge-small-zh, on all CPUs unless said.\n"
        yield from _table(["target", "wanted", "found", "", "of what"], rows)


def _model(figures: Figures, model: str) -> Iterator[str]:
    facts = figures["models"][model]
    sections = [*_bulk(figures, model), *_latency(figures, model), *_cold(figures, model)]
    sections += [*_memory(figures, model), *_growth(figures, model)]
    if not sections:
        return
    yield f"## {model}\n"
    millions = facts["operations_per_token"] / 1e6
    yield f"{facts['title'][0].upper()}{facts['title'][1:]}. {millions:.1f} million operations a token.\n"
    yield from _walls(figures, model)
    yield from sections


def _walls(figures: Figures, model: str) -> Iterator[str]:
    need = figures["models"][model]["operations_per_token"]
    for wall in figures["wall"]:
        if wall["model"] == model and wall["engine"] is not None:
            shown = ", ".join(f"{engine} {_number(spread)}" for engine, spread in wall["gops"].items())
            tokens = 1e9 * wall["gops"][wall["engine"]]["median"] / need
            yield (
                f"Ceiling of integer products on {wall['cores']} CPU, GOPS: {shown}; "
                f"the faster is {tokens:,.0f} tokens a second.\n"
            )


def _bulk(figures: Figures, model: str) -> Iterator[str]:
    rows = [row for row in figures["bulk"] if row["model"] == model]
    for name, cores in dict.fromkeys((row["workload"], row["cores"]) for row in rows):
        own = [row for row in rows if (row["workload"], row["cores"]) == (name, cores)]
        own.sort(key=lambda row: _median(row["times_base"], 1e9))
        yield f"### {WORKLOADS[name].title}, {cores} CPU\n"
        head = [
            "",
            "times",
            "tokens a second",
            "texts a second",
            "of the ceiling",
            "CPU ms a text",
            "centred cosine",
        ]
        yield from _table(head, [_bulk_row(figures, row) for row in own])


def _bulk_row(figures: Figures, row: Mapping[str, Any]) -> list[str]:
    is_int8 = figures["contenders"][row["contender"]]["precision"] == "int8"
    return [
        _title(figures, row["contender"]),
        _ratio(row["times_base"]),
        _number(row["tokens_per_second"]),
        _number(row["texts_per_second"]),
        _percent(row["share_of_wall"]) if is_int8 else "",
        _decimal(row["cpu_ms_per_text"]),
        _fidelity_of(figures, row["contender"]),
    ]


def _fidelity_of(figures: Figures, contender: str) -> str:
    """The centred cosine of the same recipe on a model with real weights."""
    found = [row for row in figures["fidelity"] if row["contender"] == contender]
    return f"{found[0]['centred_cosine']['mean']:.4f}" if found else ""


def _latency(figures: Figures, model: str) -> Iterator[str]:
    rows = [row for row in figures["latency"] if row["model"] == model]
    for name in dict.fromkeys(row["workload"] for row in rows):
        own = [row for row in rows if row["workload"] == name]
        own.sort(key=lambda row: _median(row["times_base"], 1e9))
        yield f"### {WORKLOADS[name].title}\n"
        yield from _table(
            ["", "times (p50)", "p50 ms", "p95 ms", "p99 ms", "CPU ms a text"],
            [
                [
                    _title(figures, row["contender"]),
                    _ratio(row["times_base"]),
                    *(_decimal(row[f"p{share}_ms"]) for share in (50, 95, 99)),
                    _decimal(row["cpu_ms_per_text"]),
                ]
                for row in own
            ],
        )


def _cold(figures: Figures, model: str) -> Iterator[str]:
    rows = sorted(
        (row for row in figures["cold"] if row["model"] == model),
        key=lambda row: _median(row["milliseconds"], 1e9),
    )
    if rows:
        yield f"### {WORKLOADS['cold'].title}\n"
        yield from _table(
            ["", "times", "ms", "private MB", "peak MB"],
            [
                [
                    _title(figures, row["contender"]),
                    _ratio(row["times_base"]),
                    _number(row["milliseconds"]),
                    _number(row["private_mb"]),
                    _number(row["peak_mb"]),
                ]
                for row in rows
            ],
        )


def _memory(figures: Figures, model: str) -> Iterator[str]:
    rows = sorted(
        (row for row in figures["memory"] if row["model"] == model), key=lambda row: float(row["peak_mb"])
    )
    if rows:
        yield f"### {WORKLOADS['memory'].title}\n"
        keys = ("opened_private_mb", "largest_private_mb", "largest_resident_mb", "peak_mb")
        yield from _table(
            [
                "",
                "private MB, one document",
                "private MB, after the largest batch",
                "resident MB",
                "peak MB",
                "idle CPU %",
            ],
            [
                [
                    _title(figures, row["contender"]),
                    *(f"{row[key]:.0f}" for key in keys),
                    f"{row['idle_cpu_percent']:.2f}",
                ]
                for row in rows
            ],
        )


def _growth(figures: Figures, model: str) -> Iterator[str]:
    rows = [row for row in figures["growth"] if row["model"] == model]
    if rows:
        sizes = sorted({point["texts"] for row in rows for point in row["points"]})
        yield f"### {WORKLOADS['growth'].title}\n"
        yield "Milliseconds a text, and the most megabytes resident after that many.\n"
        yield from _table(
            ["", "way", *(f"{size:,}" for size in sizes)],
            [
                [
                    _title(figures, row["contender"]),
                    "stream" if row["streamed"] else "one call",
                    *(_point(row["points"], size) for size in sizes),
                ]
                for row in rows
            ],
        )


def _point(points: Sequence[Mapping[str, Any]], size: int) -> str:
    found = [point for point in points if point["texts"] == size]
    return f"{found[0]['ms_per_text']['median']:.3f} ms, {found[0]['resident_mb']:.0f} MB" if found else ""


def _fidelity(figures: Figures) -> Iterator[str]:
    for model in dict.fromkeys(row["model"] for row in figures["fidelity"]):
        rows = [row for row in figures["fidelity"] if row["model"] == model]
        rows.sort(key=lambda row: -float(row["centred_cosine"]["mean"]))
        yield "## What speed was bought with\n"
        yield f"Vectors of {rows[0]['texts']} texts of 4 to 512 tokens with {model} (real weights) against those of"
        yield "sentence-transformers in FP32. *Centred*: after subtracting the mean vector. *Kept*: of each text's ten"
        yield "nearest neighbours.\n"
        yield from _table(
            ["", "cosine mean", "1st percentile", "worst", "centred mean", "centred worst", "kept"],
            [_fidelity_row(figures, row) for row in rows],
        )


def _fidelity_row(figures: Figures, row: Mapping[str, Any]) -> list[str]:
    plain, centred, kept = row["cosine"], row["centred_cosine"], row["top_10_overlap"]
    values = (plain["mean"], plain["percentile_1"], plain["minimum"], centred["mean"], centred["minimum"])
    return [
        _title(figures, row["contender"]),
        *(f"{value:.5f}" for value in values),
        "" if kept is None else f"{kept:.3f}",
    ]


def _contenders(figures: Figures) -> Iterator[str]:
    yield "## The contenders\n"
    yield "*MB* is what is on disk once it is installed, with all that it needs, models left out.\n"
    yield from _table(
        ["", "name", "how", "versions", "MB"],
        [
            [
                facts["title"],
                f"`{name}`",
                facts["how"],
                ", ".join(f"{package} {number}" for package, number in facts["versions"].items()),
                f"{facts['installed_mb']:.0f}" if facts["versions"] else "",
            ]
            for name, facts in figures["contenders"].items()
        ],
    )


def _skipped(figures: Figures) -> Iterator[str]:
    if figures["skipped"]:
        yield "## What was not measured\n"
        yield from _table(
            ["contender", "model", "reason"],
            [[f"`{row['contender']}`", row["model"], _cell(row["reason"])] for row in figures["skipped"]],
        )


def charts_of(figures: Figures, names: Sequence[str]) -> str:
    """The charts as a section of the page."""
    lines = ["## Charts\n", *(f"![{CHARTS[name]}](benchmarks/{name}.svg)\n" for name in names)]
    return "\n".join(lines)


def quick_table(figures: Figures) -> str:
    """The main figures as text for a terminal, one line a contender."""
    lines = []
    for model in figures["models"]:
        for row in figures["wall"]:
            if row["model"] == model:
                gops = ", ".join(f"{engine} {_number(spread)}" for engine, spread in row["gops"].items())
                lines.append(f"{model}, ceiling of integer products on {row['cores']} CPU: {gops} GOPS")
        lines += _terminal(figures, model)
    for one in figures.get("targets", []):
        if one["met"] is not None:
            wanted = (">= " if one["at_least"] else "<= ") + f"{one['bound']:g}"
            state = "met" if one["met"] else "NOT MET"
            lines.append(f"{state:8} {one['name']}: {one['value']:.2f} (wanted {wanted}) {one['detail']}")
    if figures["disturbed"]:
        lines.append(
            f"left out, because others used the machine meanwhile: {figures['disturbed']} measurements"
        )
    for row in figures["skipped"]:
        lines.append(f"not run: {row['contender']} on {row['model']}: {row['reason']}")
    return "\n".join(lines)


def _terminal(figures: Figures, model: str) -> Iterator[str]:
    for row in figures["bulk"]:
        if row["model"] == model:
            share = _percent(row["share_of_wall"]) or "-"
            yield (
                f"{model:24} {row['workload']:10} {row['cores']} CPU  {row['contender']:24} "
                f"{_number(row['tokens_per_second']):>8} tokens/s  {share:>5} of ceiling  "
                f"{_ratio(row['times_base']):>22} times {BASE}"
            )
    for row in figures["latency"]:
        if row["model"] == model:
            tail = "  ".join(f"p{share} {_decimal(row[f'p{share}_ms'])}" for share in (50, 95, 99))
            yield (
                f"{model:24} {row['workload']:10} {row['cores']} CPU  {row['contender']:24} {tail} ms  "
                f"{_ratio(row['times_base']):>22} times {BASE}"
            )
    for row in figures["cold"]:
        if row["model"] == model:
            yield (
                f"{model:24} cold             {row['contender']:24} {_number(row['milliseconds']):>8} ms  "
                f"{_number(row['private_mb'])} MB private  {_ratio(row['times_base']):>22} times {BASE}"
            )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _title(figures: Figures, contender: str) -> str:
    title = figures["contenders"][contender]["title"]
    return f"**{title}**" if contender.startswith("qingyu") else str(title)


def _median(spread: Mapping[str, float] | None, otherwise: float) -> float:
    return otherwise if spread is None else spread["median"]


def _ratio(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})"


def _number(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:,.0f}"


def _decimal(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}"


def _percent(spread: Mapping[str, float] | None) -> str:
    return "" if spread is None else f"{100 * spread['median']:.0f} %"


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").split())
