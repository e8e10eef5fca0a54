"""Jobs on a real Ray cluster on this machine, with workers and drivers that are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest

from qingyu import Embedder
from qingyu.__main__ import main
from qingyu.errors import ClusterError, InvalidOptionError
from qingyu.runtime.bulk import BulkOptions, bulk_embed, cluster

for package in ("ray", "pyarrow", "pandas"):
    if (
        importlib.util.find_spec(package) is None
    ):  # not importorskip: what ray does is settled when it is imported
        pytest.skip(f"needs {package}", allow_module_level=True)

TEXTS = ["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码", "人工智能正在改变医疗、教育和交通。"]
ROWS = 6000


@pytest.fixture(scope="module")
def on_ray():
    """A cluster of two cores, one for all tests: starting it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "available_cpus", lambda: 2)
        with cluster.connected("local"):
            yield


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "in.jsonl"
    rows = ({"id": n, "text": f"{TEXTS[n % len(TEXTS)]}{n}"} for n in range(ROWS))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(lines, tiny_model):
    with Embedder.open(tiny_model) as embedder:
        return embedder.embed([json.loads(line)["text"] for line in lines.read_text("utf-8").splitlines()])


def assert_whole(folder, expected):
    """Every row is there once, with its own vector, in parts that are all whole."""
    import pyarrow.dataset as ds

    found = ds.dataset(folder, format="parquet").to_table().sort_by("row")
    assert found["row"].to_pylist() == list(range(1, len(expected) + 1))
    assert found["id"].to_pylist() == list(range(len(expected)))
    vectors = np.array(found["vector"].combine_chunks().flatten()).reshape(expected.shape)
    assert np.abs(vectors - expected).max() < 1e-6
    assert not [path for path in folder.iterdir() if "attempt" in path.name]


def at_work(folder):
    """(block, process) of every worker that is at a block now."""
    found = []
    for path in folder.glob(".part-*.attempt-*"):
        process = int(path.name.rpartition(".")[2])
        if psutil.pid_exists(process):
            found.append((path.name.partition(".parquet")[0], process))
    return found


@contextmanager
def killing(folder, choose, times):
    """Kill -9 workers that are in the middle of a block, as soon as ``choose`` takes one; the list of their blocks."""
    killed, over = [], threading.Event()

    def watch():
        while len(killed) < times and not over.is_set():
            for block, process in at_work(folder) if folder.is_dir() else []:
                fresh = process not in [dead for _, dead in killed]  # else a dead one that is still listed
                if fresh and len(killed) < times and choose(block, [name for name, _ in killed]):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                        killed.append((block, process))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def options(block_bytes=30_000, **more):
    return BulkOptions(keep=("id",), block_bytes=block_bytes, **more)


# Few blocks for each worker, and so many that others wait at it.
FEW_AND_MANY = pytest.mark.parametrize("block_bytes", [30_000, 12_000])


@FEW_AND_MANY
def test_killed_workers_lose_and_repeat_nothing(on_ray, lines, expected, tiny_model, tmp_path, block_bytes):
    """Three workers die, each in the middle of a block of its own."""
    with killing(tmp_path / "out", lambda block, killed: block not in killed, times=3) as killed:
        done = bulk_embed(
            str(lines), tmp_path / "out", model=tiny_model, workers=2, options=options(block_bytes)
        )
    assert (done.parts >= 2 * cluster.MANY) == (block_bytes < 30_000)
    assert len({block for block, _ in killed}) == 3
    assert len({process for _, process in killed}) == 3
    done.check()
    assert (done.rows, done.bad, done.skipped) == (ROWS, 0, 0)
    assert_whole(tmp_path / "out", expected)


@FEW_AND_MANY
def test_a_block_that_every_worker_dies_at_does_not_hold_up_the_others(
    on_ray, lines, expected, tiny_model, tmp_path, block_bytes
):
    def choose(block, killed):
        return block.endswith("000003")

    with killing(tmp_path / "out", choose, times=2) as killed:
        done = bulk_embed(
            str(lines), tmp_path / "out", model=tiny_model, options=options(block_bytes, attempts=2)
        )
    assert len(killed) == 2
    assert [block.number for block in done.given_up] == [3]
    with pytest.raises(ClusterError, match="blocks were given up"):
        done.check()
    again = bulk_embed(
        str(lines), tmp_path / "out", model=tiny_model, options=options(block_bytes, attempts=2)
    )
    again.check()
    assert again.skipped == done.parts == again.parts - 1
    assert_whole(tmp_path / "out", expected)


def test_the_command_reports_bad_rows_and_exits_with_3(on_ray, lines, tiny_model, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines.read_bytes() + b'{"id": 1}\nno\n')
    arguments = ["embed", "--model", str(tiny_model), "--ray", "local", "--input", str(path), "--keep", "id"]
    code = main([*arguments, "--output", str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr()
    assert code == 3
    assert f"2 of {ROWS + 2:,} rows were not embedded" in said.err
    assert f"{ROWS:,} rows in 1 part" in said.out
    listed = (tmp_path / "out" / "_bad_rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["row"] for line in listed] == [ROWS + 1, ROWS + 2]


def test_what_ray_says_of_a_dead_worker_is_not_among_the_results(on_ray, lines, tiny_model, tmp_path, capsys):
    arguments = [
        "embed",
        "--model",
        str(tiny_model),
        "--ray",
        "local",
        "--input",
        str(lines),
        "--workers",
        "2",
    ]
    with killing(tmp_path / "out", lambda block, killed: not killed, times=1) as killed:
        code = main([*arguments, "--output", str(tmp_path / "out"), "--block-mb", "0.03"])
    said = capsys.readouterr()
    assert code == 0
    assert killed
    assert "worker died" in said.err
    assert len(said.out.splitlines()) == 1
    assert f"{ROWS:,} rows in" in said.out


def test_a_model_that_workers_cannot_read_is_a_typed_error(on_ray, lines, tiny_model, tmp_path, monkeypatch):
    import shutil

    from qingyu.errors import ModelNotFoundError

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    original = cluster.outcomes

    def vanished(*arguments):
        shutil.rmtree(model)
        return original(*arguments)

    monkeypatch.setattr(cluster, "outcomes", vanished)
    with pytest.raises(ModelNotFoundError, match="no model"):
        bulk_embed(str(lines), tmp_path / "out", model=model, options=options())


def test_more_workers_than_the_cluster_has_cores_for_are_refused(on_ray, lines, tiny_model, tmp_path):
    with pytest.raises(ClusterError, match="too small: expected 3 cores, for 3 workers of 1, found 2"):
        bulk_embed(str(lines), tmp_path / "out", model=tiny_model, workers=3, options=options())
    with pytest.raises(ClusterError, match="too small: expected 4 cores"):
        bulk_embed(str(lines), tmp_path / "out", model=tiny_model, options=options(threads=4))


def test_a_local_cluster_listens_on_loopback_alone_and_reports_nothing(on_ray):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert any("raylet" in process.name() for process in processes)
    listening = [address for process in processes for address in listening_addresses(process)]
    assert len(listening) > 3
    assert set(listening) == {"127.0.0.1"}


def listening_addresses(process):
    with suppress(psutil.NoSuchProcess):
        found = [one for one in process.net_connections(kind="inet") if one.status == psutil.CONN_LISTEN]
        return [one.laddr.ip.removeprefix("::ffff:") for one in found]
    return []


def test_an_address_without_a_cluster_is_a_typed_error_within_seconds(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    code = f"from qingyu.runtime.bulk.cluster import connected\nwith connected('127.0.0.1:{port}'): pass"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"ClusterError: no Ray cluster at 127.0.0.1:{port}: expected a running cluster" in done.stderr
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "somewhere", "127.0.0.1:", ":6379"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(InvalidOptionError, match="the address of a Ray cluster"):
        cluster._check_reachable(address)


def process_name(process):
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def test_a_killed_driver_leaves_whole_parts_and_no_worker_and_the_next_run_goes_on(
    on_ray, lines, expected, tiny_model, tmp_path, capsys
):
    out = tmp_path / "out"
    arguments = ["embed", "--model", str(tiny_model), "--ray", "local", "--input", str(lines), "--keep", "id"]
    arguments += ["--output", str(out), "--block-mb", "0.03", "--workers", "1"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "qingyu", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 100
        while len(list(out.glob("part-*"))) < 2:
            assert driver.poll() is None, driver.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    finally:
        driver.kill()
        driver.wait()
        driver.stderr.close()
    # Two of Ray's own agents look for their parent once in a while, and so end within a minute; the test does not wait.
    agents = [process for process in started if process_name(process).endswith("Agent")]
    _, alive = psutil.wait_procs([process for process in started if process not in agents], timeout=30)
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    assert not alive
    parts = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 2 <= len(parts) < 15
    assert main(arguments) == 0
    assert f"{len(parts)} of them were there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert_whole(out, expected)
