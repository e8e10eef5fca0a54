"""Jobs without Ray: this process does a worker's part. What Ray adds is in test_ray.py."""

from __future__ import annotations

import gzip
import json
import os
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qingyu import Embedder
from qingyu.errors import (
    ClusterError,
    DataFileError,
    InvalidOptionError,
    MissingExtraError,
    ModelNotFoundError,
    OutputError,
    VectorSpaceError,
)
from qingyu.runtime import vectors as forms
from qingyu.runtime.bulk import BulkOptions, bulk_embed, cluster
from qingyu.runtime.bulk.blocks import find_inputs, split
from qingyu.runtime.bulk.parts import new_attempt, part_name
from qingyu.runtime.bulk.worker import Outcome, Worker

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ds = pytest.importorskip("pyarrow.dataset")

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", "人工智能正在改变医疗、教育和交通。"]


@pytest.fixture
def here(monkeypatch):
    """Blocks are done in this process; the list of those that were."""
    done = []

    def outcomes(blocks, recipe, workers):
        worker = Worker(recipe)
        for block in blocks:
            done.append(block)
            yield worker.process(block)

    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext())
    monkeypatch.setattr(cluster, "places", lambda threads, workers: 1)
    monkeypatch.setattr(cluster, "outcomes", outcomes)
    monkeypatch.setattr("qingyu.runtime.bulk.job.require", lambda *names: None)
    return done


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(count, start=0):
    return [{"id": n, "text": f"{TEXTS[n % len(TEXTS)]}{n}"} for n in range(start, start + count)]


def table(folder):
    """All rows of the parts, as anything that reads a folder of Parquet sees them."""
    return (
        ds.dataset(folder, format="parquet")
        .to_table()
        .sort_by([("source", "ascending"), ("row", "ascending")])
    )


def vectors_of(found):
    return np.array(found["vector"].combine_chunks().flatten()).reshape(len(found), -1)


def small(**options):
    return BulkOptions(block_bytes=300, keep=("id",), **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_row_is_there_once_with_the_vector_that_embed_gives(here, tmp_path, tiny_model, name):
    rows = rows_of(53)
    path = tmp_path / "in" / name
    if name.endswith(".parquet"):
        path.parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        write_lines(path, rows)
    done = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    done.check()
    found = table(tmp_path / "out")
    assert len(here) == done.parts > 5
    assert (done.rows, done.bad, done.blank, done.report.texts) == (53, 0, 0, 53)
    assert found["id"].to_pylist() == [row["id"] for row in rows]
    assert found["row"].to_pylist() == list(range(1, 54))
    assert set(found["source"].to_pylist()) == {name}
    with Embedder.open(tiny_model) as embedder:
        expected = embedder.embed([row["text"] for row in rows])
    assert vectors_of(found) == pytest.approx(expected, abs=1e-6)


def test_files_of_a_glob_are_named_by_their_path_below_its_fixed_part(
    here, tmp_path, tiny_model, monkeypatch
):
    for name in ("x/1.jsonl", "y/1.jsonl", "y/2.jsonl"):
        write_lines(tmp_path / "in" / name, rows_of(2))
    done = bulk_embed(str(tmp_path / "in/**/*.jsonl"), tmp_path / "out", model=tiny_model, options=small())
    assert sorted(set(table(tmp_path / "out")["source"].to_pylist())) == [
        "x/1.jsonl",
        "y/1.jsonl",
        "y/2.jsonl",
    ]
    monkeypatch.chdir(tmp_path)
    again = bulk_embed("in/**/*.jsonl", "out", model=tiny_model, options=small())
    assert (again.skipped, again.parts) == (done.parts, done.parts)


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    block_bytes=st.integers(1, 90),
    ended=st.booleans(),
    form=st.sampled_from(["jsonl", "jsonl.gz"]),
)
def test_blocks_of_lines_hold_every_line_once_in_order(tmp_path_factory, lines, block_bytes, ended, form):
    path = tmp_path_factory.mktemp("lines") / f"a.{form}"
    content = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path.write_bytes(gzip.compress(content) if form.endswith("gz") else content)
    blocks = split(find_inputs(str(path))[0], block_bytes, "text")
    joined = b"".join(content[block.offset : block.offset + block.bytes] for block in blocks)
    assert joined == content
    assert [block.first for block in blocks] == list(np.cumsum([0, *(block.rows for block in blocks)])[:-1])
    assert sum(block.rows for block in blocks) == content.count(b"\n") + (
        not content.endswith(b"\n") and content != b""
    )
    # No block is larger than asked for but by its last line.
    assert all(block.bytes - block_bytes < 41 for block in blocks)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    group=st.integers(1, 15),
    block_bytes=st.integers(1, 400),
)
def test_blocks_of_parquet_hold_every_row_once(tmp_path_factory, tiny_model, sizes, group, block_bytes):
    from qingyu.runtime.bulk.rows import kept_schema, read_rows

    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    rows = [{"id": n, "text": "天" * size or None} for n, size in enumerate(sizes)]
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    files = find_inputs(str(path))
    blocks = split(files[0], block_bytes, "text")
    read = [read_rows(block, "text", kept_schema(files, "text", ["id"])) for block in blocks]
    texts = {number: text for one in read for number, text in zip(one.numbers, one.texts, strict=True)}
    bad = [row.row for one in read for row in one.bad]
    assert texts == {n + 1: row["text"] for n, row in enumerate(rows) if row["text"]}
    assert sorted([*texts, *bad]) == list(range(1, len(rows) + 1))
    kept = [n for one in read for n in one.kept["id"].to_pylist()]
    assert kept == [n - 1 for n in texts]


BAD_LINES = [
    (b"\xff\xfe\n", "not UTF-8: byte 0xff at column 1"),
    (b'{"text": "x"\n', "not JSON: "),
    (b"[" * 100_000 + b"\n", "not JSON: "),
    (b"[1]\n", "not a JSON object but a list"),
    (b'{"id": 1}\n', "no text in the field 'text'"),
    (b'{"text": null}\n', "no text in the field 'text'"),
    (b'{"text": 3}\n', "the field 'text' is a number"),
    (b'{"text": " \\u3000"}\n', "an empty text"),
    (b'{"text": "a\\ud800"}\n', "not Unicode text: a lone surrogate at character 1"),
    (b'{"text": "x", "id": "seven"}\n', "the field 'id' is a string, not int64 like the first"),
    (b'{"text": "x", "id": true}\n', "the field 'id' is a truth value, not int64 like the first"),
    (b'{"text": "x", "id": 99999999999999999999}\n', "the field 'id' is a number, not int64 like the first"),
]


def test_bad_rows_are_listed_and_all_others_embedded(here, tmp_path, tiny_model):
    path = tmp_path / "in.jsonl"
    good = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows_of(len(BAD_LINES))]
    lines = [line for pair in zip(good, (bad for bad, _ in BAD_LINES), strict=True) for line in pair]
    path.write_bytes(b"".join([*lines, b"\n", b"  \n"]))  # empty lines are no rows
    done = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    assert (done.rows, done.bad, done.blank) == (len(BAD_LINES), len(BAD_LINES), 2)
    listed = [
        json.loads(line) for line in (tmp_path / "out" / "_bad_rows.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["row"] for row in listed] == list(range(2, 2 * len(BAD_LINES) + 1, 2))
    for row, (_, reason) in zip(listed, BAD_LINES, strict=True):
        assert row["reason"].startswith(reason)
        assert row["source"] == "in.jsonl"
    assert table(tmp_path / "out")["row"].to_pylist() == list(range(1, 2 * len(BAD_LINES), 2))
    with pytest.raises(DataFileError, match=r"^12 of 24 rows were not embedded: .*_bad_rows.jsonl"):
        done.check()
    # They are not forgotten by a run that finds everything finished.
    again = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    assert (again.bad, again.skipped) == (done.bad, done.parts)


def test_a_file_without_a_single_good_row_gives_parts_without_rows(here, tmp_path, tiny_model):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"no\n")
    done = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    found = table(tmp_path / "out")
    assert (done.rows, done.bad, len(found)) == (0, 1, 0)
    assert found.schema.field("vector").type.list_size == 32


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_vectors_are_stored_as_asked_for(here, tmp_path, tiny_model, dtype):
    rows = rows_of(9)
    path = write_lines(tmp_path / "in.jsonl", rows)
    bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small(dtype=dtype, dim=16))
    found = table(tmp_path / "out")
    with Embedder.open(tiny_model) as embedder:
        plain = embedder.embed([row["text"] for row in rows], dim=16)
    stored = vectors_of(found)
    expected = {
        "float32": lambda v: v,
        "float16": forms.to_float16,
        "int8": lambda v: forms.to_int8(v).codes,
        "binary": forms.to_binary,
    }[dtype](plain)
    assert stored.dtype == expected.dtype
    # Batches are other ones here, so the last bits are.
    close = {"float32": 1e-6, "float16": 1e-3, "int8": 1, "binary": 0}[dtype]
    assert np.abs(stored.astype(float) - expected.astype(float)).max() <= close
    assert ("scale" in found.schema.names) == (dtype == "int8")
    if dtype == "int8":
        assert found["scale"].to_numpy()[:, None] * stored == pytest.approx(plain, abs=0.01)


def test_kept_fields_have_the_types_of_the_input(here, tmp_path, tiny_model):
    import datetime

    day = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.timezone.utc)
    typed = pa.table(
        {"body": ["今天"], "when": pa.array([day], pa.timestamp("us", "UTC")), "tags": [["a", "b"]]}
    )
    pq.write_table(typed, tmp_path / "a.parquet")
    options = BulkOptions(field="body", keep=("when", "tags"))
    bulk_embed(str(tmp_path / "a.parquet"), tmp_path / "out", model=tiny_model, options=options)
    assert table(tmp_path / "out").select(["when", "tags"]).equals(typed.select(["when", "tags"]))


def test_kept_fields_of_json_take_the_type_of_their_first_value(here, tmp_path, tiny_model):
    rows = [
        {"text": "今天", "a": None, "b": 1.5, "c": True, "d": {"x": [1]}},
        {"text": "明天", "a": 7, "b": 2, "c": None, "d": "plain"},
    ]
    path = write_lines(tmp_path / "in.jsonl", rows)
    options = BulkOptions(keep=("a", "b", "c", "d", "absent"))
    bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=options).check()
    found = table(tmp_path / "out")
    assert [str(found.schema.field(name).type) for name in options.keep] == [
        "int64",
        "double",
        "bool",
        "string",
        "string",
    ]
    assert found.select(["a", "b", "c", "d", "absent"]).to_pylist() == [
        {"a": None, "b": 1.5, "c": True, "d": '{"x": [1]}', "absent": None},
        {"a": 7, "b": 2.0, "c": None, "d": "plain", "absent": None},
    ]


def test_a_long_text_is_a_bad_row_where_long_texts_are_errors(here, tmp_path, tiny_model):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "今天"}, {"text": "今天" * 100}, {"text": "明天"}])
    done = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=BulkOptions(long_text="error"))
    assert (done.rows, done.bad, done.report.truncated) == (2, 1, 0)
    assert "longer than 64 tokens" in (tmp_path / "out" / "_bad_rows.jsonl").read_text()


def test_ten_megabytes_in_one_row_are_a_row(here, tmp_path, tiny_model):
    path = write_lines(tmp_path / "in.jsonl", [{"text": "今天天气真好。" * 500_000}, {"text": "明天"}])
    done = bulk_embed(str(path), tmp_path / "out", model=tiny_model)
    assert (done.rows, done.bad, done.report.truncated) == (2, 0, 1)
    assert done.report.dropped == 7 * 500_000 - 62
    assert done.report.cut == [], "numbers within a block are those of no row that anybody knows"


def test_a_rerun_does_only_what_is_missing_or_broken(here, tmp_path, tiny_model):
    path = write_lines(tmp_path / "in.jsonl", rows_of(60))
    out = tmp_path / "out"
    done = bulk_embed(str(path), out, model=tiny_model, options=small())
    parts = sorted(out.glob("part-*"))
    before = table(out)
    stamps = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:-9])
    (out / ".part-x.attempt-1.host.7").write_bytes(b"half")
    del here[:]
    again = bulk_embed(str(path), out, model=tiny_model, options=small())
    assert [block.number for block in here] == [1, 3]
    assert (again.rows, again.skipped, again.parts) == (60, done.parts - 2, done.parts)
    assert table(out).drop(["vector"]).equals(before.drop(["vector"]))
    assert all(part.stat().st_mtime_ns == stamps[part] for n, part in enumerate(parts) if n not in (1, 3))
    assert not list(out.glob(".part*"))


def test_files_may_be_added_to_a_job(here, tmp_path, tiny_model):
    write_lines(tmp_path / "in" / "b.jsonl", rows_of(20))
    pattern, out = str(tmp_path / "in" / "*.jsonl"), tmp_path / "out"
    bulk_embed(pattern, out, model=tiny_model, options=small())
    write_lines(tmp_path / "in" / "a.jsonl", rows_of(20, start=20))
    del here[:]
    done = bulk_embed(pattern, out, model=tiny_model, options=small())
    assert {block.file.name for block in here} == {"a.jsonl"}
    assert done.rows == 40
    assert sorted(table(out)["id"].to_pylist()) == list(range(40))


def changed_file(folder):
    write_lines(folder / "in" / "a.jsonl", rows_of(21))


def lost_file(folder):
    (folder / "in" / "a.jsonl").rename(folder / "in" / "c.jsonl")


@pytest.mark.parametrize(
    ("change", "options", "found"),
    [
        (changed_file, {}, "the input a.jsonl as it was when the job began, found another size or time"),
        (lost_file, {}, "the input a.jsonl as it was when the job began, found no such file"),
        (None, {"prompt": "query"}, "a job with fingerprint qy1-[0-9a-f]+, found fingerprint qy1-"),
        (None, {"dtype": "int8"}, "a job with dtype float32, found dtype int8"),
        (None, {"keep": ()}, "a job with columns {'id': 'int64'}, found columns {}"),
        (None, {"block_bytes": 301}, "a job with block_bytes 300, found block_bytes 301"),
        (None, {"long_text": "mean"}, "a job with long_text truncate, found long_text mean"),
    ],
)
def test_a_folder_with_another_job_is_refused(here, tmp_path, tiny_model, change, options, found):
    write_lines(tmp_path / "in" / "a.jsonl", rows_of(20))
    pattern, out = str(tmp_path / "in" / "*.jsonl"), tmp_path / "out"
    bulk_embed(pattern, out, model=tiny_model, options=small())
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".parquet"}
    if change:
        change(tmp_path)
    with pytest.raises(OutputError, match=f"holds another job: expected {found}"):
        bulk_embed(pattern, out, model=tiny_model, options=replace(small(), **options))
    assert before == {
        path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".parquet"
    }


def test_a_folder_in_use_is_refused(here, tmp_path, tiny_model, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", rows_of(20))
    inner = []

    def outcomes(blocks, recipe, workers):
        with pytest.raises(OutputError, match="is in use") as caught:
            bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
        inner.append(caught.value)
        yield from map(Worker(recipe).process, blocks)

    monkeypatch.setattr(cluster, "outcomes", outcomes)
    assert bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small()).rows == 20
    assert len(inner) == 1


def test_foreign_parts_and_manifests_are_refused(here, tmp_path, tiny_model):
    path = write_lines(tmp_path / "in.jsonl", rows_of(2))
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-0.parquet").touch()
    with pytest.raises(OutputError, match=r"parts without _qingyu\.json"):
        bulk_embed(str(path), out, model=tiny_model)
    (out / "_qingyu.json").write_text("[]")
    with pytest.raises(OutputError, match="found something else in it"):
        bulk_embed(str(path), out, model=tiny_model)


def test_a_file_that_changes_during_the_job_ends_it(here, tmp_path, tiny_model, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", rows_of(20))

    def outcomes(blocks, recipe, workers):
        write_lines(path, rows_of(21))
        yield from map(Worker(recipe).process, blocks)

    monkeypatch.setattr(cluster, "outcomes", outcomes)
    with pytest.raises(DataFileError, match=r"has changed: expected .* as when the job was planned"):
        bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_worker_with_another_model_is_refused(here, tmp_path, tiny_model, tiny_int8, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", rows_of(2))

    def outcomes(blocks, recipe, workers):
        yield from map(Worker(replace(recipe, model=str(tiny_int8))).process, blocks)

    monkeypatch.setattr(cluster, "outcomes", outcomes)
    with pytest.raises(VectorSpaceError, match="has another model at"):
        bulk_embed(str(path), tmp_path / "out", model=tiny_model)


def test_parts_that_only_workers_see_are_an_error(here, tmp_path, tiny_model, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", rows_of(2))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def outcomes(blocks, recipe, workers):
        yield from map(Worker(replace(recipe, output=elsewhere)).process, blocks)

    monkeypatch.setattr(cluster, "outcomes", outcomes)
    with pytest.raises(OutputError, match="lacks parts that workers have written"):
        bulk_embed(str(path), tmp_path / "out", model=tiny_model)


def test_a_block_that_has_killed_its_workers_is_given_up_and_the_others_are_done(
    here, tmp_path, tiny_model, monkeypatch
):
    path = write_lines(tmp_path / "in.jsonl", rows_of(40))
    died = []

    def outcomes(blocks, recipe, workers):
        died.extend(new_attempt(recipe.output, blocks[1], number) for number in (1, 2, 3))
        yield from map(Worker(recipe).process, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "outcomes", outcomes)
        done = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    assert [block.number for block in done.given_up] == [1]
    with pytest.raises(ClusterError, match=f"^1 of {done.parts + 1} blocks were given up: .* rows 8 to "):
        done.check()
    assert done.rows == 40 - done.given_up[0].rows
    # The next run tries it anew.
    again = bulk_embed(str(path), tmp_path / "out", model=tiny_model, options=small())
    again.check()
    assert (again.rows, again.skipped) == (40, done.parts)
    assert not [path for path in died if path.exists()]


def test_a_worker_that_was_given_up_for_dead_but_lives_changes_nothing(here, tmp_path, tiny_model):
    """Its block was done by another one, and its temporary file cleared away, while it was at it."""
    path = write_lines(tmp_path / "in.jsonl", rows_of(3))
    bulk_embed(str(path), tmp_path / "out", model=tiny_model)
    before = table(tmp_path / "out")
    from qingyu.runtime.bulk import parts

    block = here[0]
    slow = new_attempt(tmp_path / "out", block, 1)
    parts.clear_attempts(tmp_path / "out", block)
    facts = parts.read_facts(tmp_path / "out", block)
    original = os.replace

    def vanish(self, target):
        self.unlink()
        original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(slow), "replace", vanish)
        parts.write_part(slow, before, facts, tmp_path / "out", block)
    assert table(tmp_path / "out").equals(before)


def test_a_full_disk_is_a_typed_error_and_leaves_no_half_part(here, tmp_path, tiny_model, monkeypatch):
    path = write_lines(tmp_path / "in.jsonl", rows_of(3))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OutputError, match="No space left on device"):
        bulk_embed(str(path), tmp_path / "out", model=tiny_model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_qingyu.json", "_qingyu.lock"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 1000)[:-20], "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", b"plain", "cannot read .*a.jsonl.gz"),
        ("a.parquet", b"PAR1 no", "cannot read .*a.parquet"),
        ("a.csv", b"", "cannot tell the format of .*a.csv"),
        ("a.parquet.gz", b"", "cannot tell the format of"),
    ],
)
def test_files_that_cannot_be_read_end_the_job_before_it_begins(
    here, tmp_path, tiny_model, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        bulk_embed(str(tmp_path / "a.*"), tmp_path / "out", model=tiny_model)
    assert not here


def test_parquet_files_need_the_columns_asked_for(here, tmp_path, tiny_model):
    pq.write_table(pa.table({"n": [1], "title": ["今天"]}), tmp_path / "a.parquet")
    for options, message in (
        (BulkOptions(), "has no column 'text': expected a column of that name, found 'n', 'title'"),
        (BulkOptions(field="n"), "the column 'n' of .* is not text: expected strings, found int64"),
        (BulkOptions(field="title", keep=("id",)), "has no column 'id'"),
    ):
        with pytest.raises(DataFileError, match=message):
            bulk_embed(str(tmp_path / "a.parquet"), tmp_path / "out", model=tiny_model, options=options)
    pq.write_table(pa.table({"n": ["1"], "title": ["今天"]}), tmp_path / "b.parquet")
    options = BulkOptions(field="title", keep=("n",))
    with pytest.raises(DataFileError, match=r"b.parquet has other types: expected n int64, found n string"):
        bulk_embed(str(tmp_path / "*.parquet"), tmp_path / "out", model=tiny_model, options=options)


def test_options_out_of_range_are_refused(here, tmp_path, tiny_model):
    path = str(write_lines(tmp_path / "in.jsonl", rows_of(2)))
    for options, name in (
        (BulkOptions(keep=("vector",)), "keep"),
        (BulkOptions(block_bytes=0), "block_bytes"),
        (BulkOptions(attempts=0), "attempts"),
        (BulkOptions(threads=0), "threads"),
        (BulkOptions(dim=99), "dim"),
        (BulkOptions(long_text="cut"), "long_text"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidOptionError, match=name):
            bulk_embed(path, tmp_path / "out", model=tiny_model, options=options)
    with pytest.raises(InvalidOptionError, match="workers"):
        bulk_embed(path, tmp_path / "out", model=tiny_model, workers=0)
    with pytest.raises(ModelNotFoundError):
        bulk_embed(path, tmp_path / "out", model=tmp_path / "none")
    with pytest.raises(DataFileError, match="no input"):
        bulk_embed(str(tmp_path / "none*.jsonl"), tmp_path / "out", model=tiny_model)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_error_gives_the_command(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qingyu\[ray\]"'):
        bulk_embed("in.jsonl", tmp_path / "out")


def test_an_outcome_and_its_errors_survive_pickling(tmp_path):
    import pickle

    path = write_lines(tmp_path / "in.jsonl", rows_of(2))
    block = split(find_inputs(str(path))[0], 100, "text")[0]
    error = OutputError("full", expected="room", found="none", remedy="Make some.")
    again = pickle.loads(pickle.dumps(Outcome(block, error=error)))
    assert again.block == block
    assert str(again.error) == str(error)
    assert part_name(again.block) == part_name(block)
