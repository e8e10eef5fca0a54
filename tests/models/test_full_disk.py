"""On a real disk that is full every command says so in one typed error and leaves nothing half-written.

Each test runs in a child with a mount namespace of its own, where a small tmpfs is the disk; it goes with the child.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qingyu

pytest.importorskip("huggingface_hub")
UNSHARE = shutil.which("unshare")


def namespace() -> list[str]:
    if UNSHARE is not None:
        for options in (["-m"], ["-rm"]):
            command = [UNSHARE, *options, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
            if subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0:
                return [UNSHARE, *options]
    return []


INSIDE = namespace() if sys.platform == "linux" else []
pytestmark = pytest.mark.skipif(not INSIDE, reason="needs the right to mount a tmpfs")


@pytest.fixture
def on_small_disk(tmp_path):
    """A function that runs a shell script with a disk of so many bytes at ``$DISK``: (exit code, output, error)."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(script: str, size: int) -> tuple[int, str, str]:
        mounted = f"set -e\nmount -t tmpfs -o size={size} tmpfs {disk}\n{script}"
        environment = {
            **os.environ,
            "DISK": str(disk),
            "QINGYU_HOME": str(disk / "home"),
            "PYTHON": sys.executable,
        }
        environment["PYTHONPATH"] = str(Path(qingyu.__file__).parents[1])
        done = subprocess.run(
            [*INSIDE, "sh", "-c", mounted],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
            cwd=tmp_path,
        )
        return done.returncode, done.stdout, done.stderr

    return run


# What is left of files on the disk, hidden ones included, and the exit code of the command before.
LEFT = 'code=$?; find "$DISK" -type f -not -path "*/locks/*" -not -path "*/selfcheck/*" -printf "%P\\n"; exit $code'


def test_a_file_that_does_not_fit_is_refused_before_it_is_fetched(on_small_disk, hub):
    size = len(hub.files["model.safetensors"])
    small = size // 4096 * 4096 - 4096
    code, out, error = on_small_disk(
        f"set +e; $PYTHON -m qingyu pull someone/tiny-zh --download-only; {LEFT}", small
    )
    assert code == 5, error
    assert f"a place for a file of {size:,} bytes" in error
    assert "bytes are free. Free space (see `qingyu cache list`), or set QINGYU_HOME" in error
    assert len(error.splitlines()) == 1
    assert not any(Path(name).name.startswith((".", "model.safetensors")) for name in out.split())
    assert not hub.requested("model.safetensors")


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_no_part_of_it(on_small_disk, hub, tmp_path):
    """Something else takes the space that was free when the transfer began."""
    size = len(hub.files["model.safetensors"])
    (tmp_path / "driver.py").write_text(
        "import shutil\n"
        "shutil.disk_usage = lambda path, real=shutil.disk_usage: real(path)._replace(free=1 << 40)\n"
        "from qingyu.__main__ import main\n"
        "raise SystemExit(main(['pull', 'someone/tiny-zh', '--download-only']))\n"
    )
    code, out, error = on_small_disk(f"set +e; $PYTHON driver.py; {LEFT}", size // 4096 * 4096 - 8192)
    assert code == 5, error
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert not any(Path(name).name.startswith((".", "model.safetensors")) for name in out.split())
    assert hub.requested("model.safetensors")


def test_a_disk_with_room_for_the_checkpoint_but_not_for_the_model_keeps_the_checkpoint_alone(
    on_small_disk, hub
):
    room = sum(-(-len(data) // 4096) * 4096 for data in hub.files.values())
    code, out, error = on_small_disk(
        f"set +e; $PYTHON -m qingyu pull someone/tiny-zh --recipe fp32; {LEFT}", room + 80_000
    )
    assert code == 5, error
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    left = [name.removeprefix("home/") for name in out.split()]
    (record,) = (name for name in left if name.startswith("records/"))
    folder = record.replace("records/", "checkpoints/").removesuffix(".json")
    assert sorted(left) == sorted([record, *(f"{folder}/{name}" for name in hub.files)])


def test_vectors_that_do_not_fit_leave_no_file(on_small_disk, tiny_model):
    code, out, error = on_small_disk(
        f"yes 今天天气真好 | head -n 3000 > texts.txt; set +e;"
        f"$PYTHON -m qingyu embed --model {tiny_model} --input texts.txt --output $DISK/v.npy; {LEFT}",
        131_072,
    )
    assert code == 5, error
    assert "No space left on device" in error
    assert out == ""


@pytest.mark.parametrize(
    "command", ["export {checkpoint} $DISK/m", "quantize {model} $DISK/m --texts texts.txt"]
)
def test_a_model_that_does_not_fit_leaves_no_folder(on_small_disk, tiny_checkpoint, tiny_model, command):
    command = command.format(checkpoint=tiny_checkpoint, model=tiny_model)
    code, out, error = on_small_disk(
        f"seq -f 今天%g天气 20 > texts.txt; mkdir $DISK/home; set +e; $PYTHON -m qingyu {command}; {LEFT}",
        40_960,
    )
    assert code == 5, error
    assert "No space left on device" in error
    assert len(error.splitlines()) == 1
    assert [name for name in out.split() if not name.startswith("home/")] == []


def test_a_bundle_that_does_not_fit_leaves_no_file_and_is_unpacked_elsewhere(on_small_disk, tiny_int8):
    code, out, error = on_small_disk(
        f"$PYTHON -m qingyu bundle {tiny_int8} tiny.qingyu > /dev/null; set +e;"
        f"$PYTHON -m qingyu bundle {tiny_int8} $DISK/tiny.qingyu; echo $?;"
        f"$PYTHON -m qingyu unbundle tiny.qingyu $DISK/tiny; echo $?;"
        f"$PYTHON -m qingyu embed --model tiny.qingyu 今天天气真好 > /dev/null; {LEFT}",
        40_960,
    )
    assert code == 0, error
    assert out.splitlines() == ["5", "5"]
    assert error.count("No space left on device") == 2
