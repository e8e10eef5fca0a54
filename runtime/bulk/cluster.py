"""Ray, as far as a job uses it: a connection, and blocks spread over a pool of workers by Ray Data.

Not here: what a worker does (``qingyu.runtime.bulk.worker``).
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qingyu.errors import ClusterError, InvalidOptionError
from qingyu.runtime.bulk.blocks import Block
from qingyu.runtime.bulk.worker import Outcome, Recipe, Worker
from qingyu.runtime.cpu import available_cpus

__all__ = ["connected", "outcomes", "places"]

CONNECT_SECONDS = 10.0
# From so many blocks for each worker on, a second one waits at it: Ray Data looks only every 0.1 s for what has ended,
# and a worker would have nothing to do meanwhile. With fewer, the last block might wait at one worker while another is
# idle. A block that waits at a worker that dies was not begun, so it counts as no attempt.
MANY = 8
# Read when ray is imported. Without the first, Ray reports usage to its makers; the second makes it listen on
# loopback alone (its name is about the systems where that is the default).
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0"}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a Ray cluster: at HOST:PORT, the one that runs on this machine ("auto"), or a new one ("local").

    The last listens on loopback alone and ends with the block. A connection that the caller has made already is used
    in place of any, and left as it is.
    """
    os.environ.update(PRIVATE)
    if "ray" not in sys.modules and address == "local":
        os.environ.update(LOOPBACK)
    import ray

    if ray.is_initialized():
        yield
        return
    if address not in ("local", "auto"):
        _check_reachable(address)
    try:
        with _failures(address):
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({"include_dashboard": False, "num_cpus": available_cpus()} if address == "local" else {}),
            )
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise InvalidOptionError(
            "the address of a Ray cluster",
            expected='HOST:PORT, "auto" or "local"',
            found=repr(address),
            remedy="`ray start --head` prints the address.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


@contextmanager
def _failures(address: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreachable(address, str(error).strip().partition("\n")[0]) from None


def _unreachable(address: str, found: str) -> ClusterError:
    return ClusterError(
        f"no Ray cluster at {address}",
        expected="a running cluster of the same versions of ray and Python",
        found=found,
        remedy="Start one with `ray start --head`, or use --ray local.",
    )


def places(threads: int, workers: int | None) -> int:
    """How many workers of so many cores run at once: as many as asked for, or as fit into the cluster."""
    import ray

    cores = int(ray.cluster_resources().get("CPU", 0))
    fit = cores // threads
    if fit < (workers or 1):
        raise ClusterError(
            "the cluster is too small",
            expected=f"{(workers or 1) * threads} cores, for {workers or 1} workers of {threads}",
            found=f"{cores}",
            remedy="Ask for fewer --workers, or --threads each.",
        )
    return fit if workers is None else workers


def outcomes(blocks: Sequence[Block], recipe: Recipe, workers: int) -> Iterator[Outcome]:
    """What becomes of each block, in the order in which they end; a dead worker is replaced, and its block repeated."""
    import ray

    with warnings.catch_warnings():
        # Of Ray's own parts about each other.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        yield from _outcomes(ray, blocks, recipe, workers)


def _outcomes(ray: Any, blocks: Sequence[Block], recipe: Recipe, workers: int) -> Iterator[Outcome]:  # noqa: ANN401
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    items = [{"block": pickle.dumps(block)} for block in blocks]
    size = min(workers, len(blocks))
    pool = ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2 if len(blocks) >= MANY * size else 1)
    try:
        data = ray.data.from_items(items, override_num_blocks=len(items)).map(
            Worker, fn_constructor_args=(recipe,), num_cpus=recipe.options.threads, compute=pool
        )
        for row in data.iter_rows():
            yield pickle.loads(row["outcome"])
    except ray.exceptions.RayError as error:
        raise ClusterError(
            "the cluster failed",
            expected="workers that start and answer",
            found=str(error).strip().splitlines()[-1],
            remedy="Start the same job again: it goes on after what is finished.",
        ) from error
