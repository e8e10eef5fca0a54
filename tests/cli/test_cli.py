"""The command line as a user meets it: output, exit codes, and never a traceback."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qingyu import Embedder
from qingyu.__main__ import COMMANDS, main
from qingyu.cli.table import clip, render, width

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_embed_prints_one_json_object_a_text(run, tiny_model):
    code, out, err = run("embed", "--model", tiny_model, *TEXTS)
    assert (code, err) == (0, "")
    assert [row["text"] for row in rows(out)] == TEXTS
    with Embedder.open(tiny_model) as embedder:
        assert np.array_equal(np.float32([row["vector"] for row in rows(out)]), embedder.embed(TEXTS))


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.txt", "\n".join(TEXTS) + "\n", []),
        ("b.txt", "\r\n".join(TEXTS), []),
        ("c.txt", "\ufeff" + "\n".join(TEXTS), []),
        ("d.jsonl", "\n".join(json.dumps({"text": t}) for t in TEXTS), []),
        ("e.jsonl", "\n\n".join(json.dumps({"title": t}) for t in TEXTS), ["--field", "title"]),
        ("f.tsv", "label\ttext\n" + "\n".join(f"1\t{t}" for t in TEXTS), []),
        ("g.tsv", "s1\ts2\n" + "\n".join(f"{t}\tx" for t in TEXTS), []),
        ("h.tsv", "\n".join(f"1\t{t}" for t in TEXTS), ["--field", "2"]),
        ("i.data", "s1\ts2\n" + "\n".join(f"x\t{t}" for t in TEXTS), ["--format", "tsv", "--field", "s2"]),
    ],
)
def test_every_input_form_gives_the_same_texts(run, tiny_model, tmp_path, name, content, options):
    path = tmp_path / name
    path.write_bytes(content.encode())
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(content.encode()))
    sources = [path] if name == "i.data" else [path, zipped]
    for source in sources:
        code, out, err = run("embed", "--model", tiny_model, "--input", source, *options)
        assert (code, err) == (0, "")
        assert [row["text"] for row in rows(out)] == TEXTS


def test_standard_input_is_read_when_no_text_is_given(run, tiny_model):
    code, out, _ = run("embed", "--model", tiny_model, stdin="今天\n\n天气".encode())
    assert code == 0
    assert [row["text"] for row in rows(out)] == ["今天", "", "天气"], "row n is line n, empty lines too"


@pytest.mark.parametrize(
    ("dtype", "kind", "columns"),
    [("float32", "f4", 32), ("float16", "f2", 32), ("int8", "i1", 32), ("binary", "u1", 4)],
)
def test_npy_output_has_a_row_for_each_line(run, tiny_model, tmp_path, dtype, kind, columns):
    lines = [TEXTS[n % 3] * (n % 4) for n in range(300)]
    output = tmp_path / "vectors.npy"
    source = "\n".join(lines).encode() + b"\n"
    code, out, err = run("embed", "--model", tiny_model, "--output", output, "--dtype", dtype, stdin=source)
    assert (code, out, err) == (0, "", "")
    array = np.load(output, allow_pickle=False)
    assert array.shape == (300, columns)
    assert array.dtype == np.dtype(kind)
    expected = {"vectors.npy", "vectors.scales.npy"} if dtype == "int8" else {"vectors.npy"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    if dtype == "int8":
        with Embedder.open(tiny_model) as embedder:
            restored = array * np.load(tmp_path / "vectors.scales.npy")[:, None]
            assert np.abs(restored - embedder.embed(lines)).max() < 0.01


def test_no_lines_give_an_array_of_no_rows(run, tiny_model, tmp_path):
    code, _, _ = run("embed", "--model", tiny_model, "--output", tmp_path / "v.npy", stdin=b"")
    assert code == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 32)


def test_a_failed_run_leaves_the_old_output(run, tiny_model, tmp_path):
    output = tmp_path / "v.npy"
    output.write_bytes(b"old")
    code, _, err = run(
        "embed", "--model", tiny_model, "--output", output, stdin="好\n".encode() * 500 + b"\xff\n"
    )
    assert code == 3
    assert "line 501 is not text: expected UTF-8, found byte 0xff at column 1" in err
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_options_reach_the_embedder(run, tiny_model):
    _, out, _ = run(
        "embed", "--model", tiny_model, "--prompt", "query", "--dim", "8", "--no-normalize", "今天"
    )
    with Embedder.open(tiny_model) as embedder:
        expected = embedder.embed("今天", prompt="query", dim=8, normalize=False)
    assert np.array_equal(np.float32([rows(out)[0]["vector"]]), expected)


def test_what_was_cut_is_said(run, tiny_model):
    long = "今天天气真好" * 50
    code, _, err = run("embed", "--model", tiny_model, long, "今天")
    assert code == 0
    said = "1 of 2 texts were cut at 64 tokens (--long-text error refuses them, mean reads them whole); 238 "
    assert said + "characters were not read: the last 238 of text 0" in err
    for command in ("embed", "similarity"):
        code, out, err = run(command, "--model", tiny_model, "--long-text", "error", "今天", long)
        assert (code, out) == (3, "")
        assert "is too long" in err
        code, _, err = run(command, "--model", tiny_model, "--long-text", "mean", "今天", long)
        assert code == 0
        assert "were read in pieces" in err
        assert "cut" not in err


def test_of_many_cut_texts_the_first_are_named_and_all_counted(run, tiny_model, tmp_path):
    (tmp_path / "texts.txt").write_text("今天天气真好" * 12 + "\n" + ("今天" * 40 + "\n") * 30, "utf-8")
    _, _, err = run("embed", "--model", tiny_model, "--input", tmp_path / "texts.txt")
    assert "31 of 31 texts were cut" in err
    assert f"; {10 + 30 * 18} characters were not read: the last 10 of text 0, the last 18 of text 1, " in err
    assert err.rstrip().endswith("the last 18 of text 19, and those of 11 more texts")


def test_what_was_read_in_pieces_is_said(run, tiny_model):
    long = "今天天气真好。" * 30
    code, out, err = run(
        "embed", "--model", tiny_model, "--long-text", "mean", "--overlap", "10", long, "今天"
    )
    assert code == 0
    assert "1 of 2 texts were read in pieces" in err
    assert "were cut" not in err
    with Embedder.open(tiny_model) as embedder:
        wanted = embedder.embed(long, long_text="mean", overlap=10)[0]
    assert np.allclose(json.loads(out.splitlines()[0])["vector"], wanted, atol=1e-6)


def test_unknown_tokens_are_warned_of(run, tiny_model):
    _, _, err = run("embed", "--model", tiny_model, "魑魅魍魉")
    assert err.startswith("warning: 100% of 4 tokens are unknown")


def test_similarity_ranks_by_cosine(run, tiny_model):
    code, out, _ = run("similarity", "--model", tiny_model, "--json", *TEXTS)
    assert code == 0
    with Embedder.open(tiny_model) as embedder:
        assert np.allclose(json.loads(out)["cosine"], embedder.similarity(TEXTS[:1], TEXTS), atol=1e-6)
    code, out, _ = run("similarity", "--model", tiny_model, *TEXTS)
    shown = [float(line.split()[0]) for line in out.splitlines()[4:]]
    assert shown == sorted(shown, reverse=True)
    _, out, _ = run("similarity", "--model", tiny_model, "--matrix", *TEXTS)
    assert out.count("1.000") == 3


def test_export_quantize_info_and_doctor_work_in_a_row(run, tiny_checkpoint, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{text}{n}" for text in TEXTS for n in range(10)), encoding="utf-8")
    fp32, int8 = tmp_path / "fp32", tmp_path / "int8"
    code, out, _ = run("export", tiny_checkpoint, fp32, "--prompt", "passage=段落：")
    assert code == 0
    assert "32 dimensions, FP32" in out
    code, out, _ = run("quantize", fp32, int8, "--texts", texts)
    assert code == 0
    assert "centred cosine to FP32" in out
    assert "top-10 neighbours kept" in out
    code, out, _ = run("verify", int8, "--against", fp32, "--texts", texts)
    assert code == 0
    assert out.rstrip().endswith("The certificate in the manifest says the same.")
    code, out, _ = run("info", int8, "--json")
    assert code == 0
    described = json.loads(out)
    assert described["precision"] == "int8"
    assert described["prompts"] == {"query": "查询：", "passage": "段落："}
    assert described["certificate"]["cosine"]["mean"] > 0.99
    code, out, _ = run("info", int8)
    assert "int8, recipe rowwise" in out
    code, out, _ = run("doctor", "--model", int8, "--json")
    report = json.loads(out)
    assert code == 0, report
    assert report["model check"].startswith("passed")
    assert report["integer kernels"] in ("exact", "saturates")
    assert report["self-check"].startswith("passed: 4 golden texts")


def test_doctor_names_a_damaged_file(run, tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1000] ^= 4
    (copy / "model.onnx").write_bytes(data)
    code, out, _ = run("doctor", "--model", copy)
    assert code == 4
    assert "FAILED" in out
    assert "model.onnx is damaged" in out


def mistakes(tmp_path, model, checkpoint):
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": \n')
    (tmp_path / "short.tsv").write_text("a\ttext\nonly\n")
    return {
        "no such model": (5, ["embed", "--model", tmp_path / "none", "好"], "no model"),
        "not a model": (5, ["embed", "--model", tmp_path, "好"], "expected qingyu.json"),
        "no such file": (3, ["embed", "--model", model, "--input", tmp_path / "none"], "No such file"),
        "a folder as file": (3, ["embed", "--model", model, "--input", tmp_path], "Is a directory"),
        "not gzip": (3, ["embed", "--model", model, "--input", checkpoint / "x.gz"], "cannot read"),
        "wrong type": (
            3,
            ["embed", "--model", model, "--input", tmp_path / "bad.jsonl"],
            "a string in the field 'text'",
        ),
        "not JSON": (
            3,
            ["embed", "--model", model, "--input", tmp_path / "broken.jsonl"],
            "line 1 is not JSON",
        ),
        "short row": (
            3,
            ["embed", "--model", model, "--input", tmp_path / "short.tsv"],
            "at least 2 columns",
        ),
        "no column": (
            3,
            ["embed", "--model", model, "--input", tmp_path / "short.tsv", "--field", "b"],
            "no column 'b'",
        ),
        "fields of lines": (
            3,
            ["embed", "--model", model, "--input", tmp_path / "x.txt", "--field", "b"],
            "cannot read",
        ),
        "two sources": (3, ["embed", "--model", model, "--input", "-", "好"], "two sources of text"),
        "odd output": (
            5,
            ["embed", "--model", model, "--output", tmp_path / "v.csv", "好"],
            ".npy or .jsonl",
        ),
        "no folder": (
            5,
            ["embed", "--model", model, "--output", tmp_path / "no" / "v.npy", "好"],
            "cannot write",
        ),
        "surrogate": (3, ["embed", "--model", model, "a\ud800"], "surrogate"),
        "one text": (3, ["similarity", "--model", model, "好"], "expected 2 to 2000, found 1"),
        "threads": (3, ["embed", "--model", model, "--threads", "999", "好"], "threads"),
        "memory": (5, ["embed", "--model", model, "--max-memory-mb", "10", "好"], "Raise max_memory_mb"),
        "no checkpoint": (5, ["export", tmp_path / "none", tmp_path / "out"], "none"),
        "onto itself": (5, ["export", checkpoint, checkpoint], "outside the checkpoint"),
        "no prompt": (3, ["export", checkpoint, tmp_path / "out", "--prompt", "query"], "NAME=TEXT"),
        "one text only": (
            3,
            ["quantize", model, tmp_path / "out", "--texts", tmp_path / "one.txt"],
            "at least 2",
        ),
    }


def test_mistakes_end_in_one_line_and_their_exit_code(run, tiny_model, tiny_checkpoint, tmp_path):
    (tmp_path / "one.txt").write_text("好\n好\n", encoding="utf-8")
    for name, (expected, arguments, message) in mistakes(tmp_path, tiny_model, tiny_checkpoint).items():
        code, _, err = run(*arguments)
        assert (code, message in err, err.count("\n")) == (expected, True, 1), f"{name}: {code} {err}"
        assert not (tmp_path / "out").exists(), name


def test_quantizing_twice_is_refused(run, tiny_int8, tmp_path):
    (tmp_path / "texts.txt").write_text("好\n坏\n", encoding="utf-8")
    code, _, err = run("quantize", tiny_int8, tmp_path / "out", "--texts", tmp_path / "texts.txt")
    assert code == 4
    assert "already quantized" in err


NAMES = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_help_with_an_example(run, capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  qingyu {command}" in capsys.readouterr().out


def test_a_wrong_command_line_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["embed", "--threads", "many", "好"])
    assert ended.value.code == 2
    assert "--threads" in capsys.readouterr().err


def shell(arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "qingyu", *map(str, arguments)], **options)


def test_a_closed_pipe_ends_without_a_word(tiny_model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("今天天气真好\n" * 20_000, encoding="utf-8")
    process = shell(
        ["embed", "--model", tiny_model, "--input", texts], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_with_130_and_leaves_no_file(tiny_model, tmp_path):
    read, write = os.pipe()
    arguments = ["embed", "--model", tiny_model, "--output", tmp_path / "v.npy"]
    with shell(arguments, stdin=read, stderr=subprocess.PIPE) as process:
        os.close(read)
        os.write(write, "今天\n".encode() * 3000)
        deadline = time.monotonic() + 30
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
        said = process.stderr.read()
        os.close(write)
    # A shell sees 130 either way: CPython ends itself by the signal if that came while C code ran Python code.
    assert code in (130, -signal.SIGINT)
    assert said == b"interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_embed_shows_a_table_and_a_bar(tiny_model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 200), encoding="utf-8")

    def on_terminal(*arguments):
        master, slave = pty.openpty()
        process = shell(arguments, stdout=slave, stderr=slave, stdin=slave)
        os.close(slave)
        seen = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the terminal is gone
                break
            if not piece:
                break
            seen += piece
        os.close(master)
        assert process.wait(60) == 0
        return seen.decode()

    shown = on_terminal("embed", "--model", tiny_model, *TEXTS)
    assert shown.splitlines()[0].startswith("text ")
    assert shown.count("今天天气真好") == 1
    bar = on_terminal("embed", "--model", tiny_model, "--input", texts, "--output", tmp_path / "v.npy")
    assert "600 texts" in bar


def test_tables_align_text_of_two_cells():
    table = render(["name", "n"], [["轻语", "1"], ["ab", "10"]], right=frozenset({1}))
    lines = table.splitlines()
    assert len({width(line) for line in lines}) == 1
    assert clip("a\nb", 9) == "a b"
    assert width(clip("轻语" * 50, 21)) <= 21


def test_texts_that_are_not_measured_on_are_said(run, tiny_model, tiny_int8, tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"今天{n}天气\n" for n in range(9)), "utf-8")
    options = ["--against", tiny_model, "--texts", tmp_path / "texts.txt", "--speed-rounds", "0"]
    for most, said in ((8, "only the first 8 texts are used of --texts "), (9, "")):
        code, _, err = run("verify", tiny_int8, *options, "--max-texts", most)
        assert code == 0
        assert err.startswith(said) if said else "only the first" not in err


def test_calibration_texts_that_are_not_used_are_said(capsys, tmp_path):
    from qingyu.cli.quantize import CALIBRATION_TEXTS, _calibration

    (tmp_path / "many.txt").write_text("今天\n" * (CALIBRATION_TEXTS + 1), "utf-8")
    assert len(_calibration(str(tmp_path / "many.txt")) or []) == CALIBRATION_TEXTS
    assert capsys.readouterr().err.startswith("only the first 512 texts are used of --calibration ")
    assert _calibration(None) is None
