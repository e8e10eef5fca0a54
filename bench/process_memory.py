"""What the kernel says of this process's memory. Linux only."""

from __future__ import annotations

__all__ = ["KILOBYTE", "megabytes", "peak_bytes", "read_sizes"]

KILOBYTE = 1 << 10
MEGABYTE = 1 << 20


def read_sizes(file: str = "/proc/self/smaps_rollup") -> dict[str, int]:
    """The sizes that such a file names, in bytes."""
    with open(file, encoding="ascii", errors="replace") as lines:  # noqa: PTH123 - pathlib takes 5 ms to import
        rows = [line.split() for line in lines]
    return {row[0].rstrip(":"): int(row[1]) * KILOBYTE for row in rows if len(row) == 3 and row[2] == "kB"}


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    ``getrusage`` will not do: what it reports as the peak starts with that of the process that started this one.
    """
    return read_sizes("/proc/self/status")["VmHWM"]


def megabytes() -> dict[str, float]:
    """Resident, private and peak memory of this process, in MB.

    Private is what no other process maps: dirty pages, and clean ones of files that only this process has open.
    """
    sizes = read_sizes()
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    found = {"resident": sizes["Rss"], "private": private, "peak": peak_bytes()}
    return {name: round(size / MEGABYTE, 1) for name, size in found.items()}
