"""An ``Embedder`` with the ``encode`` of sentence-transformers, for code that was written for that.

Needs numpy alone; torch only where tensors are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qingyu.errors import InvalidOptionError
from qingyu.models.extras import require
from qingyu.runtime import vectors as forms
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.integrations.common import opened
from qingyu.runtime.task import BUNDLED

__all__ = ["SentenceEncoder"]

Precision = Literal["float32", "ubinary", "binary"]
ROLES = {"query": ("query",), "document": ("document", "passage", "corpus")}


class SentenceEncoder:
    """A model whose methods are called like those of ``SentenceTransformer``, and give the same vectors.

    ``batch_size``, ``device`` and chunk sizes are taken and have no effect: micro-batches are cut by tokens. What one
    text gives is one vector (dim,), as there, and a list gives (n, dim). ``model`` is a folder, a name or an
    ``Embedder``.
    """

    similarity_fn_name = "cosine"

    def __init__(
        self,
        model: str | os.PathLike[str] | Embedder = BUNDLED,
        *,
        truncate_dim: int | None = None,
    ) -> None:
        self.embedder = opened(model)
        self.truncate_dim = truncate_dim

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts, by name."""
        return self.embedder.spec.prompts

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that is used where none is asked for."""
        return self.embedder.spec.default_prompt

    @property
    def max_seq_length(self) -> int:
        """How many tokens the model reads."""
        return self.embedder.spec.max_tokens

    def get_sentence_embedding_dimension(self) -> int:
        """How many values a vector has."""
        return self.truncate_dim or self.embedder.dim

    get_embedding_dimension = get_sentence_embedding_dimension

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding"] = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:  # noqa: ANN401 - what sentence-transformers gives depends on the options
        """The vectors of the sentences, as an array; a list of arrays or a tensor where that is asked for.

        ``prompt`` is put before each text as it is; ``prompt_name`` names one of ``prompts``.
        ``normalize_embeddings=False`` does what the model itself does. "ubinary" and "binary" are packed signs, as
        uint8 and int8. Raises ``InvalidOptionError`` for an unknown prompt or an ``output_value`` that is not there.
        """
        if output_value != "sentence_embedding":
            raise _refused(
                "output_value", "'sentence_embedding'", output_value, "HiddenStates gives tokens' vectors."
            )
        if precision not in ("float32", "ubinary", "binary"):
            raise _refused("precision", "float32, ubinary or binary", precision, "Use one of them.")
        vectors = self.embedder.embed(
            [sentences] if isinstance(sentences, str) else list(sentences),
            prompt=self._prompt(prompt_name, prompt),
            dim=truncate_dim or self.truncate_dim,
            normalize=True if normalize_embeddings else None,
            progress=bool(show_progress_bar),
        )
        stored: Any = vectors if precision == "float32" else forms.to_binary(vectors)
        if precision == "binary":
            stored = (stored.astype(np.int16) - 128).astype(np.int8)
        if convert_to_tensor:
            stored = _tensor(stored)
        elif not convert_to_numpy:
            stored = list(stored)
        return stored[0] if isinstance(sentences, str) else stored

    def encode_query(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,  # noqa: ANN401 - those of encode
    ) -> Any:  # noqa: ANN401
        """``encode`` with the model's prompt for queries, where it has one and no other is asked for."""
        return self.encode(sentences, prompt_name or self._role("query", prompt), prompt, **options)

    def encode_document(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,  # noqa: ANN401 - those of encode
    ) -> Any:  # noqa: ANN401
        """``encode`` with the model's prompt for documents, where it has one and no other is asked for."""
        return self.encode(sentences, prompt_name or self._role("document", prompt), prompt, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401 - arrays or tensors
        """Cosines (n, m), float32; a tensor where a tensor is given."""
        return _like(embeddings1, forms.cosine(_rows(embeddings1), _rows(embeddings2)))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401
        """Cosines (n,) of the first of one with the first of the other, and so on."""
        a, b = forms.unit(_rows(embeddings1)), forms.unit(_rows(embeddings2))
        return _like(embeddings1, np.einsum("nd,nd->n", a, b))

    def _prompt(self, name: str | None, text: str | None) -> str | None:
        if text is not None or name is None:
            return text
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise _refused(
                "prompt_name", f"one of the model's prompts: {known}", name, "Pass prompt=TEXT instead."
            )
        return self.prompts[name]

    def _role(self, role: str, prompt: str | None) -> str | None:
        named = (name for name in ROLES[role] if name in self.prompts)
        return next(named, None) if prompt is None else None


def _refused(option: str, expected: str, found: object, remedy: str) -> InvalidOptionError:
    return InvalidOptionError(option, expected=expected, found=repr(found), remedy=remedy)


def _rows(vectors: Any) -> Floats:  # noqa: ANN401
    if isinstance(vectors, (list, tuple)):
        vectors = np.stack([np.asarray(vector) for vector in vectors])
    rows: Floats = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    return rows


def _like(given: Any, found: Floats) -> Any:  # noqa: ANN401
    return found if isinstance(given, (np.ndarray, list, tuple)) else _tensor(found)


def _tensor(vectors: Any) -> Any:  # noqa: ANN401
    require("reference", "torch")
    import torch

    return torch.from_numpy(vectors)
