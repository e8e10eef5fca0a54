"""Fixtures of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {name}/ of the shared files, which lie beside the checkout where they are at hand")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real checkpoints and tokenizers beside the checkout."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts and measuring sets beside the checkout."""
    return _shared("data")
