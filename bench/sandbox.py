"""A function bundle in a sandbox like the platforms': read-only, no network, no home, nothing to write to but /tmp.

    python -m qingyu.bench.sandbox BUNDLE

BUNDLE is a folder of ``qingyu bundle-app`` for lambda, scf or fc. It is bound read-only into a new root of its own
that holds besides only Python, the C library, /proc, four devices and an empty /tmp: no /dev/shm, no /sys, no home.
An unprivileged user runs its entry there and sends it a request. Prints one JSON line: the answers' statuses, their
vectors' cosine with those of the bundle's model outside, the time from start to first answer, the peak of resident
memory, and what was written to /tmp. Exits with 1 when anything is not as it should be.

Needs root and Linux. Not here: a platform's own limits of CPU, its freezing of sandboxes, and its snapshots.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qingyu.errors import OperatorError, QingyuError
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.serverless.app_bundle import TEXTS
from qingyu.runtime.vectors import cosine

__all__ = ["main", "run_in_sandbox", "why_not"]

BAR = 0.99999  # cosine of a text's vector in the sandbox and outside, by the same files on the same CPU
SECONDS = 60

# $1 the new root, $2 the bundle, $3 the folder of Python, then the command. In namespaces of its own for mounts,
# processes and network; as the user "nobody" in the end.
ENTER = """set -e
root=$1 bundle=$2 python=$3
shift 3
mount -t tmpfs -o size=1m,mode=755 none "$root"
mkdir -p "$root/var/task" "$root/tmp" "$root/proc" "$root/dev" "$root/usr" "$root/opt/python"
readonly_bind() { mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }
readonly_bind /usr "$root/usr"
for name in /lib /lib64 /bin; do
  [ -e "$name" ] || continue
  if [ -L "$name" ]; then ln -s "$(readlink "$name")" "$root$name"; continue; fi
  mkdir -p "$root$name"; readonly_bind "$name" "$root$name"
done
readonly_bind "$python" "$root/opt/python"
readonly_bind "$bundle" "$root/var/task"
mount -t proc none "$root/proc"
for name in null zero random urandom; do : > "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
mount -t tmpfs -o size=512m,mode=1777 none "$root/tmp"
mount -o remount,ro "$root"
exec chroot --userspec=65534:65534 "$root" /usr/bin/env -i PATH=/usr/bin:/bin LANG=C.UTF-8 \\
  LD_LIBRARY_PATH=/opt/python/lib "$@"
"""

# What a platform's runtime does: import the entry, then pass it event after event.
DRIVER = """
import json, os, sys, time
start = float(sys.argv[3])
sys.path.insert(0, "/var/task")
module, name = sys.argv[1].split(".")
handler = getattr(__import__(module), name)
prepared = time.time()
answers, first = [], prepared
for event in json.loads(sys.argv[2]):
    answers.append(handler(event, None))
    if len(answers) == 1:
        first = time.time()
def refused(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.errno
    os.unlink(path)
    return 0
status = {line.split(":")[0]: line.split()[1] for line in open("/proc/self/status") if ":" in line}
print(json.dumps({
    "answers": answers,
    "prepared_ms": round(1e3 * (prepared - start), 1),
    "first_answer_ms": round(1e3 * (first - start), 1),
    "peak_mb": round(int(status["VmHWM"]) / 1024, 1),
    "user": os.getuid(),
    "read_only": [bool(refused(path)) for path in ("/var/task/x", "/x", "/usr/x", "/dev/x")],
    "absent": [not os.path.exists(path) for path in ("/dev/shm", "/sys/devices", "/home", "/root", "/etc/passwd")],
    "written": sorted(os.listdir("/tmp")),
    "network": sorted(line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]),
}))
"""


def why_not() -> str | None:
    """What is missing here for a sandbox; ``None`` where nothing is."""
    missing = [name for name in ("unshare", "chroot", "mount") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}"
    probe = ["unshare", "--mount", "--pid", "--fork", "--net", "mount", "-t", "tmpfs", "none", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else None


def run_in_sandbox(bundle: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the driver prints: the handler's answers to the events, and facts about the sandbox.

    Raises ``OperatorError`` where there can be no sandbox or the function ends badly in it.
    """
    reason = why_not()
    if reason is not None:
        raise OperatorError(
            "no sandbox on this machine", expected="Linux, and root", found=reason, remedy="Run it as root."
        )
    handler = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["handler"]
    python = Path(sys.base_prefix).resolve()
    program = f"/opt/python/bin/python{sysconfig.get_python_version()}"
    with tempfile.TemporaryDirectory(prefix="qingyu-sandbox-") as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        enter = ["unshare", "--mount", "--pid", "--fork", "--net", "sh", "-c", ENTER, "sh"]
        inner = [program, "-I", "-S", "-B", "-c", DRIVER, str(handler), json.dumps(events)]
        command = [*enter, str(root), str(bundle.resolve()), str(python), *inner, str(time.time())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise _failed(f"nothing within {SECONDS} s") from None
    if done.returncode:
        raise _failed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode))
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


def _failed(found: str) -> OperatorError:
    return OperatorError(
        "the function does not run in the sandbox",
        expected="an answer",
        found=found,
        remedy="Make the bundle again.",
    )


def request(path: str, document: object) -> dict[str, Any]:
    """An event that each of the handlers understands, of a POST request."""
    body = json.dumps(document, ensure_ascii=False)
    headers = {"content-type": "application/json"}
    return {"httpMethod": "POST", "path": path, "headers": headers, "requestContext": {}, "body": body}


def measure(bundle: Path) -> dict[str, Any]:
    """One JSON-like row about a bundle; ``sound`` says whether all is as it should be."""
    events = [request("/embed", {"inputs": list(TEXTS)}), request("/v1/embeddings", {"input": TEXTS[0]})]
    found = run_in_sandbox(bundle, events)
    statuses = [answer["statusCode"] for answer in found["answers"]]
    least = 0.0
    if statuses == [200, 200]:
        with Embedder.open(bundle / "model", profile="edge") as embedder:
            outside = embedder.embed(TEXTS)
        vectors = np.array(json.loads(found["answers"][0]["body"]), dtype=np.float32)
        least = round(float(np.diag(cosine(vectors, outside)).min()), 7)
    closed = all(found["read_only"]) and all(found["absent"]) and found["network"] in ([], ["lo"])
    row = {key: found[key] for key in ("prepared_ms", "first_answer_ms", "peak_mb", "written", "stderr")}
    sound = closed and least >= BAR and not found["written"] and not found["stderr"]
    return {"bundle": str(bundle), "statuses": statuses, "least_cosine": least, **row, "sound": sound}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 when the bundle does not do in the sandbox what it does outside."""
    parser = argparse.ArgumentParser(prog="python -m qingyu.bench.sandbox", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", type=Path, help="a folder that qingyu bundle-app made for a function")
    options = parser.parse_args(arguments)
    try:
        row = measure(options.bundle)
    except QingyuError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0 if row["sound"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
