"""The fidelity report: one HTML file with charts, for people who would rather look than read a certificate.

It needs nothing from outside, no script, and follows the reader's light or dark mode. Not here: measuring
(``qingyu.quantize.fidelity``, ``qingyu.quantize.layers``) and the words of figures (``certificate``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qingyu.errors import OutputError
from qingyu.quantize.certificate import (
    Certificate,
    Cosines,
    TextCosines,
    cosine_rows,
    environment_rows,
    figure_rows,
)
from qingyu.quantize.charts import STYLE, Bar, Range, bars, columns, escaped, histogram, ranges
from qingyu.quantize.layers import LayerError
from qingyu.runtime.spec import ModelSpec

__all__ = ["PassedOver", "report_html", "write_report"]


class PassedOver(NamedTuple):
    """A recipe that was tried and not taken, why, and what it measured if it came so far."""

    recipe: str
    reason: str
    certificate: Certificate | None


def write_report(
    path: Path,
    *,
    spec: ModelSpec,
    certificate: Certificate,
    cosines: TextCosines,
    verdict: str,
    passed: bool,
    layers: Sequence[LayerError] = (),
    passed_over: Sequence[PassedOver] = (),
) -> None:
    """Write ``report_html`` of the same arguments to ``path``, whole or not at all; ``OutputError`` if not."""
    page = report_html(
        spec=spec,
        certificate=certificate,
        cosines=cosines,
        verdict=verdict,
        passed=passed,
        layers=layers,
        passed_over=passed_over,
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("x", encoding="utf-8") as stream:
                stream.write(page)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write the report to {path}",
            expected="a file in a folder that can be written",
            found=error.strerror or type(error).__name__,
            remedy="Name another file, or free space there.",
        ) from None


def report_html(
    *,
    spec: ModelSpec,
    certificate: Certificate,
    cosines: TextCosines,
    verdict: str,
    passed: bool,
    layers: Sequence[LayerError] = (),
    passed_over: Sequence[PassedOver] = (),
) -> str:
    """The report as one HTML page that is also well-formed XML.

    ``spec`` is the candidate's, ``cosines`` are those that ``certificate`` was taken from, ``verdict`` is a
    sentence on the gate that was ``passed`` or not, ``layers`` the error after each layer where it was measured,
    and ``passed_over`` the recipes tried before.
    """
    title = f"{spec.name}, {spec.recipe or spec.precision}"
    sections = [
        f"<h1>{escaped(spec.name)} <span>{escaped(spec.recipe or spec.precision)}</span></h1>",
        _verdict(verdict, passed),
        _section("Fidelity to FP32", _cosine_table(certificate) + _pairs(figure_rows(certificate))),
        _section("Where the cosines lie", _cosine_charts(certificate, cosines)),
        _section("Cost", _cost_charts(spec, certificate)),
        _section("Error after each layer", _layer_charts(layers)),
        _section("Recipes passed over", _passed_over(passed_over)),
        _section("Model", _pairs(_model_rows(spec))),
        _section("Measured with", _pairs(environment_rows(certificate.environment))),
    ]
    return _PAGE.format(title=escaped(title), style=_STYLE + STYLE, body="\n".join(filter(None, sections)))


def _verdict(verdict: str, passed: bool) -> str:
    kind, word = ("pass", "Passed") if passed else ("fail", "Refused")
    return f'<p class="verdict {kind}"><strong>{word}.</strong> {escaped(verdict)}</p>'


def _section(title: str, content: str) -> str:
    """A part of the page; nothing where there is nothing to show."""
    return f"<section><h2>{escaped(title)}</h2>{content}</section>" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: frozenset[int]) -> str:
    """A table; the columns ``numbers`` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if n in numbers else "" for n in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escaped(c)}</{tag}>" for kind, c in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escaped(a)}</dt><dd>{escaped(b)}</dd>" for a, b in rows) + "</dl>"


def _cosine_table(certificate: Certificate) -> str:
    head = ("", "texts", "mean", "1st pct", "minimum")
    return _table(head, cosine_rows(certificate), numbers=frozenset({1, 2, 3, 4}))


def _figure(title: str, chart: str, note: str = "") -> str:
    explained = f"<small>{escaped(note)}</small>" if note else ""
    return f"<figure><figcaption>{escaped(title)}{explained}</figcaption>{chart}</figure>"


def _grid(figures: Iterable[str]) -> str:
    joined = "".join(figures)
    return f'<div class="charts">{joined}</div>' if joined else ""


def _cosine_charts(certificate: Certificate, cosines: TextCosines) -> str:
    kinds = (
        ("Plain cosine", cosines.plain, certificate.bands, "Texts by their cosine to FP32."),
        (
            "Centred cosine",
            cosines.centred,
            certificate.centred_bands,
            "The same after subtracting the mean FP32 vector, which shows what compressed cosines hide.",
        ),
    )
    figures = []
    for title, values, _, note in kinds:
        marks = {"mean": float(values.mean()), "1st percentile": float(np.percentile(values, 1))}
        figures.append(_figure(title, histogram(values, label=title.lower(), marks=marks), note))
    for title, _, bands, _ in kinds:
        if bands:
            note = (
                "Rows: tokens of a text. Dot and number: mean; tick: 1st percentile; line: from the minimum."
            )
            chart = ranges(_band_rows(bands), label=title.lower())
            figures.append(_figure(f"{title} by length", chart, note))
    return _grid(figures)


def _band_rows(bands: Mapping[str, Cosines]) -> list[Range]:
    return [Range(name, c.minimum, c.percentile_1, c.mean) for name, c in bands.items()]


def _cost_charts(spec: ModelSpec, certificate: Certificate) -> str:
    figures = []
    name = spec.precision.upper()
    if (size := certificate.size) is not None:
        sizes = (("FP32", size.reference_bytes, False), (name, size.candidate_bytes, True))
        rows = [Bar(label, count / 1e6, f"{count / 1e6:.1f} MB", mine) for label, count, mine in sizes]
        figures.append(_figure("Size of the graph", bars(rows, label="megabytes; less is better")))
    if (speed := certificate.speed) is not None:
        rows = [Bar("FP32", 1.0, "1.00 x", False), Bar(name, speed.ratio, f"{speed.ratio:.2f} x", True)]
        chart = bars(rows, label="times FP32 throughput; more is better")
        note = (
            f"Median of {speed.rounds} interleaved rounds, which gave {speed.least:.2f} to {speed.most:.2f}."
        )
        figures.append(_figure("Speed", chart, note))
    return _grid(figures)


def _layer_charts(layers: Sequence[LayerError]) -> str:
    if not layers:
        return ""
    head = ("after layer", "relative error", "mean cosine", "minimum cosine")
    rows = [
        (str(e.layer), f"{e.relative_error:.3%}", f"{e.cosine_mean:.5f}", f"{e.cosine_minimum:.5f}")
        for e in layers
    ]
    table = _table(head, rows, numbers=frozenset({0, 1, 2, 3}))
    label = "after layer (0: the embedding)"
    charts = (
        _figure(
            "Relative error",
            columns([100 * e.relative_error for e in layers], label=label, unit="%"),
            "Norm of the difference to the FP32 states by the norm of these; earlier layers' error included.",
        ),
        _figure(
            "Worst token",
            columns([1 - e.cosine_minimum for e in layers], label=label, unit="1 - cos"),
            "1 minus the lowest cosine of any token's state to FP32.",
        ),
    )
    return f"{_grid(charts)}<details><summary>Figures</summary>{table}</details>"


def _passed_over(candidates: Sequence[PassedOver]) -> str:
    if not candidates:
        return ""
    head = ("recipe", "why", "cosine mean", "minimum", "centred mean", "MB", "speed")
    rows = ((c.recipe, c.reason, *_short_figures(c.certificate)) for c in candidates)
    return _table(head, rows, numbers=frozenset(range(2, 7)))


def _short_figures(certificate: Certificate | None) -> tuple[str, ...]:
    if certificate is None:
        return ("",) * 5
    cosines = (
        certificate.cosine.mean,
        certificate.cosine.minimum,
        certificate.centred_cosine.mean,
    )
    size, speed = certificate.size, certificate.speed
    return (
        *(f"{value:.5f}" for value in cosines),
        "" if size is None else f"{size.candidate_bytes / 1e6:.1f}",
        "" if speed is None else f"{speed.ratio:.2f} x",
    )


def _model_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    sizes, source = spec.architecture, spec.source
    rows = [
        ("name", spec.name),
        ("recipe", f"{spec.recipe or 'none'} ({spec.precision})"),
        (
            "encoder",
            f"{sizes.model_type}, {sizes.layers} layers of {sizes.hidden_size}, {sizes.heads} heads, "
            f"{sizes.vocab_size:,} tokens in the vocabulary",
        ),
        ("vectors", f"{spec.dim} dimensions, {spec.pooling} pooling, at most {spec.max_tokens} tokens"),
        ("source", " ".join(filter(None, (source.repository, source.revision))) or "not stated"),
        ("licence", source.license or "not stated"),
    ]
    record = spec.files.get(spec.graph)
    return (
        rows if record is None else [*rows, (spec.graph, f"{record.bytes:,} bytes, sha256 {record.sha256}")]
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1d2329; --muted: #59636e;
  --grid: #e1e5ea; --accent: #2468b4; --other: #a3adb8; --good: #1a7f37; --bad: #c0282d; }
@media (prefers-color-scheme: dark) { :root { --page: #121518; --card: #1b2025; --text: #e4e8ec;
  --muted: #98a3ae; --grid: #303840; --accent: #6aa9f4; --other: #6b7681; --good: #4cc26a; --bad: #ff7a75; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 8px 0 12px; overflow-wrap: anywhere; }
h1 span { color: var(--muted); font-weight: 400; }
h2 { font-size: 17px; margin: 0 0 10px; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 14px 16px;
  margin: 14px 0; }
.verdict { border-left: 5px solid; background: var(--card); padding: 10px 14px; margin: 0; border-radius: 4px; }
.pass { border-color: var(--good); } .pass strong { color: var(--good); }
.fail { border-color: var(--bad); } .fail strong { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
td:not(.number) { min-width: 110px; }
th { color: var(--muted); font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(110px, auto) 1fr; gap: 4px 16px; margin: 0; font-size: 14px; }
.scroll + dl { margin-top: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 20px 28px; }
figure { margin: 0; max-width: 520px; display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-weight: 500; margin-bottom: 8px; }
figcaption small { display: block; color: var(--muted); font-weight: 400; }
details { margin-top: 10px; font-size: 14px; } summary { cursor: pointer; color: var(--muted); }
@media (max-width: 520px) {
  body { padding: 8px; } section { padding: 10px; } td:not(.number) { min-width: 84px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  table { font-size: 13px; } th, td { padding-right: 6px; } th.number { white-space: normal; }
}
@media print { details > * { display: block; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
