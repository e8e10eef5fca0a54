from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qingyu.errors import OutputError
from qingyu.quantize.certificate import (
    Certificate,
    Size,
    TextCosines,
    Texts,
    certificate_rows,
    compare,
    cosine_rows,
    environment_rows,
    figure_rows,
    text_cosines,
)
from qingyu.quantize.charts import Bar, Range, bars, columns, histogram, ranges
from qingyu.quantize.evaluation import Change
from qingyu.quantize.layers import LayerError
from qingyu.quantize.report import PassedOver, report_html, write_report
from qingyu.quantize.speed import Speed
from qingyu.runtime.spec import Architecture, FileRecord, ModelSpec

HOSTILE = "<script>alert('轻语 & \"x\"')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


def spec(name: str = "bge-small-zh") -> ModelSpec:
    return ModelSpec(
        name=name,
        task="embedding",
        architecture=Architecture("bert", 4, 512, 8, 2048, 21128, 512, "gelu", 1e-12),
        dim=512,
        max_tokens=512,
        pooling="cls",
        normalize=True,
        lowercase=True,
        graph="model.onnx",
        inputs=("input_ids", "attention_mask"),
        outputs=("token_states", "pooled"),
        precision="int8",
        recipe="rowwise",
        files={"model.onnx": FileRecord(23965033, "ab" * 32)},
    )


def measured(rows: int = 60, noise: float = 0.05) -> tuple[Certificate, TextCosines]:
    random = np.random.default_rng(3)
    a = random.normal(size=(rows, 16)).astype(np.float32)
    b = a + noise * random.normal(size=a.shape).astype(np.float32)
    certificate = dataclasses.replace(
        compare(a, b, [4 + 9 * n for n in range(rows)]),
        texts=Texts.of(["a"] * rows),
        recall_change=(Change("cmrc2018", 4219, 93.21, 93.1),),
        spearman_change=(Change("sts-b-zh/dev", 1458, 71.5, 71.45),),
        size=Size(95_800_000, 23_965_033, "cd" * 32),
        speed=Speed(2.41, 2.33, 2.5, 5, 64, 2, 512),
    )
    return certificate, text_cosines(a, b)


LAYERS = [LayerError(n, 0.0117 + 0.003 * n, 0.9999 - 0.0001 * n, 0.9991 - 0.001 * n) for n in range(5)]


def page(*, layers: Sequence[LayerError] = LAYERS, passed_over: Sequence[PassedOver] = ()) -> str:
    certificate, cosines = measured()
    return report_html(
        spec=spec(),
        certificate=certificate,
        cosines=cosines,
        verdict="Mean 0.99 asked.",
        passed=True,
        layers=layers,
        passed_over=passed_over,
    )


class Balanced(HTMLParser):
    """Reads HTML and notes tags that are not closed in order, and everything that would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"script", "link", "img", "iframe"} or any(
            key in {"src", "href"} or key.startswith("on") for key, _ in attrs
        ):
            self.wrong.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> str:
    """The words of a page, once it is known to be sound and to need nothing from outside."""
    reader = Balanced()
    reader.feed(text)
    reader.close()
    assert (reader.open, reader.wrong) == ([], [])
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert "url(" not in text
    assert "@import" not in text
    return "\n".join(reader.text)


def numbers(svg: str) -> list[float]:
    """Every coordinate and size in a chart, once it is known to be well-formed."""
    root = ElementTree.fromstring(svg)
    keys = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"}
    found = [float(node.attrib[key]) for node in root.iter() for key in keys & node.attrib.keys()]
    return found + [float(number) for number in root.attrib["viewBox"].split()]


def inside(svg: str) -> bool:
    """Whether a chart is drawn of finite numbers, no negative sizes, and within its own frame."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    sizes = [
        float(node.attrib[key]) for node in root.iter() for key in ("width", "height") if key in node.attrib
    ]
    points = [
        (float(node.attrib[key]), limit)
        for node in root.iter()
        for key, limit in (
            ("x", width),
            ("x1", width),
            ("x2", width),
            ("y", height),
            ("y1", height),
            ("y2", height),
        )
        if key in node.attrib
    ]
    finite = all(math.isfinite(number) for number in numbers(svg))
    return finite and min(sizes, default=0) >= 0 and all(-0.5 <= v <= limit + 0.5 for v, limit in points)


# The page


def test_a_page_holds_every_figure_of_the_certificate() -> None:
    certificate, _ = measured()
    words = read(page())
    for row in (
        *cosine_rows(certificate),
        *figure_rows(certificate),
        *environment_rows(certificate.environment),
    ):
        for cell in row:
            assert cell in words
    for layer in LAYERS:
        assert f"{layer.relative_error:.3%}" in words
        assert f"{layer.cosine_minimum:.5f}" in words


def test_a_page_names_model_recipe_and_verdict() -> None:
    words = read(page())
    for part in (
        "bge-small-zh",
        "rowwise",
        "Passed.",
        "Mean 0.99 asked.",
        "23,965,033 bytes",
        "4 layers of 512",
    ):
        assert part in words


def test_a_refused_model_says_so() -> None:
    certificate, cosines = measured()
    words = read(
        report_html(spec=spec(), certificate=certificate, cosines=cosines, verdict="Too far.", passed=False)
    )
    assert "Refused." in words
    assert "Passed." not in words


def test_recipes_passed_over_are_listed_with_why_and_what_they_reached() -> None:
    certificate, _ = measured(noise=0.4)
    tried = [
        PassedOver("dynamic", "mean below 0.99", certificate),
        PassedOver("static", "no calibration", None),
    ]
    words = read(page(passed_over=tried))
    for part in ("dynamic", "mean below 0.99", f"{certificate.cosine.mean:.5f}", "static", "no calibration"):
        assert part in words


def test_rows_of_a_page_are_those_of_the_terminal() -> None:
    certificate, _ = measured()
    rows = certificate_rows(certificate)
    assert [label for label, *_ in cosine_rows(certificate)] == [label for label, _ in rows][:10]
    assert rows[10:] == [*figure_rows(certificate), *environment_rows(certificate.environment)]


def test_markup_in_names_and_texts_is_shown_not_obeyed() -> None:
    certificate, cosines = measured()
    certificate = dataclasses.replace(
        certificate,
        recall_change=(Change(HOSTILE, 1, 1.0, 1.0),),
        environment=dataclasses.replace(certificate.environment, cpu=HOSTILE),
    )
    text = report_html(
        spec=spec(HOSTILE),
        certificate=certificate,
        cosines=cosines,
        verdict=HOSTILE,
        passed=True,
        passed_over=[PassedOver(HOSTILE, HOSTILE, None)],
    )
    assert "<script" not in text
    assert read(text).count(HOSTILE) >= 6


def test_characters_that_no_page_may_hold_are_replaced(tmp_path: Path) -> None:
    certificate, cosines = measured()
    write_report(
        tmp_path / "r.html",
        spec=spec("a\x00b\ud800c\x1bd{title}"),
        certificate=certificate,
        cosines=cosines,
        verdict="",
        passed=True,
    )
    assert "a\ufffdb\ufffdc\ufffdd{title}" in read((tmp_path / "r.html").read_text(encoding="utf-8"))


def test_what_was_not_measured_leaves_no_empty_section() -> None:
    certificate, cosines = measured(rows=3)
    bare = dataclasses.replace(
        certificate, size=None, speed=None, texts=None, recall_change=(), spearman_change=()
    )
    text = report_html(spec=spec(), certificate=bare, cosines=cosines, verdict="", passed=True)
    words = read(text)
    for title in ("Cost", "Error after each layer", "Recipes passed over"):
        assert title not in words
    assert "Where the cosines lie" in words
    assert text.count("<svg") == 4


def test_every_chart_of_a_page_lies_within_its_frame() -> None:
    charts = re.findall(r"<svg.*?</svg>", page(), flags=re.DOTALL)
    assert len(charts) == 8
    assert all(inside(chart) for chart in charts)


def test_a_page_follows_dark_mode_and_narrow_screens() -> None:
    text = page()
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "max-width: 520px" in text


# The file


def arguments() -> dict:
    certificate, cosines = measured()
    return {
        "spec": spec(),
        "certificate": certificate,
        "cosines": cosines,
        "verdict": "",
        "passed": True,
    }


def test_a_report_replaces_the_one_before_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, **arguments())
    first = path.read_text(encoding="utf-8")
    write_report(path, **{**arguments(), "verdict": "again"})
    assert "again" in path.read_text(encoding="utf-8")
    assert "again" not in first
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match=r"cannot write the report to .*taken"):
        write_report(tmp_path / "taken", **arguments())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write_report(tmp_path / "file" / "r.html", **arguments())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken"]


# Charts


@pytest.mark.parametrize(
    "values",
    [[1.0], [1.0] * 50, [0.0, 0.0], [-1.0, 1.0], [1 - 1e-15, 1.0], [0.9999999, 1.0], [0.5] + [1.0] * 4999],
)
def test_a_histogram_of_any_cosines_is_drawn_within_its_frame(values: list[float]) -> None:
    array = np.array(values)
    marks = {"mean": float(array.mean()), "1st percentile": float(np.percentile(array, 1))}
    svg = histogram(array, label="cosine", marks=marks)
    assert inside(svg)
    counted = [int(title.rsplit(" ", 1)[1]) for title in re.findall(r"<title>(.*?)</title>", svg)]
    assert sum(counted) == len(values)


@pytest.mark.parametrize(
    "rows",
    [[], [Range("1-16", 1.0, 1.0, 1.0)], [Range("a", 0.5, 0.6, 0.9), Range("b", -1.0, 0.0, 1.0)]],
)
def test_ranges_of_any_rows_are_drawn_within_their_frame(rows: list[Range]) -> None:
    assert inside(ranges(rows, label="cosine"))


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 13, [5.0], [1e-9, 2e-9], [0.1 * n for n in range(49)]])
def test_columns_of_any_values_are_drawn_within_their_frame(values: list[float]) -> None:
    svg = columns(values, label="after layer", unit="%")
    assert inside(svg)
    assert svg.count("<rect") == len(values)


@pytest.mark.parametrize("largest", [1e-4, 0.0083, 0.068, 5.9, 20.0, 54321.0])
def test_labels_of_the_value_axis_are_not_cut_off(largest: float) -> None:
    for svg in (
        columns([largest], label="after layer", unit="1 - cos"),
        histogram(np.zeros(max(1, int(largest))), label="x", marks={}),
    ):
        texts = [node for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
        ends = [node for node in texts if node.attrib["text-anchor"] == "end"]
        assert len(ends) >= 2
        assert all(float(node.attrib["x"]) >= 7 * len(node.text or "") for node in ends)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [138.8, 35.3], [1.0, 1e6]])
def test_bars_of_any_values_are_drawn_within_their_frame(values: list[float]) -> None:
    rows = [Bar("x", value, f"{value} MB", True) for value in values]
    svg = bars(rows, label="MB")
    assert inside(svg)
    assert all(row.shown in svg for row in rows)


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars([Bar("FP32", 4.0, "4", False), Bar("INT8", 1.0, "1", True)], label="MB")
    lengths = [
        float(node.attrib["width"]) for node in ElementTree.fromstring(svg).iter() if "width" in node.attrib
    ]
    assert lengths[0] / lengths[1] == pytest.approx(4.0, rel=0.01)


def test_axes_are_labelled_with_round_numbers() -> None:
    svg = histogram(np.linspace(0.9976, 0.9999, 100), label="cosine to FP32", marks={})
    texts = [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    assert {"texts", "0", "cosine to FP32", "0.998", "0.999"} <= set(texts)


def test_counts_are_labelled_with_whole_numbers() -> None:
    svg = histogram(np.array([0.1, 0.2, 0.2]), label="x", marks={})
    texts = [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    assert [text for text in texts if text in {"0", "1", "2"}] == ["0", "1", "2"]
