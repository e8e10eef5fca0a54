"""What all integrations share: opening a model, and its prompts for queries and documents."""

from __future__ import annotations

import os
from typing import NamedTuple

from qingyu.runtime.embedder import Embedder
from qingyu.runtime.spec import ModelSpec

__all__ = ["RolePrompts", "opened", "role_prompts"]


class RolePrompts(NamedTuple):
    """What is put before queries, and before documents."""

    query: str
    passage: str


def role_prompts(spec: ModelSpec, *, query: str | None = None, passage: str | None = None) -> RolePrompts:
    """The prompts that are given, by name or as text; else the model's own for each role, else its default."""
    own = {name: name if name in spec.prompts else None for name in ("query", "passage")}
    return RolePrompts(
        spec.prompt_text(own["query"] if query is None else query),
        spec.prompt_text(own["passage"] if passage is None else passage),
    )


def opened(model: str | os.PathLike[str] | Embedder) -> Embedder:
    """The embedder itself, or that of a model folder or name."""
    return model if isinstance(model, Embedder) else Embedder.open(model)
