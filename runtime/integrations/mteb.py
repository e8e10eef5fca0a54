"""An ``Embedder`` as mteb's ``EncoderProtocol`` (mteb 2), so that its tasks run on our models unchanged.

Needs mteb, which is no extra of ours: ``pip install mteb``, with the CPU build of torch in place before.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from qingyu.models.extras import require
from qingyu.runtime.embedder import Embedder
from qingyu.runtime.engine import Floats
from qingyu.runtime.integrations.common import opened, role_prompts
from qingyu.runtime.integrations.sentence_transformers import SentenceEncoder
from qingyu.runtime.task import BUNDLED

__all__ = ["MtebEncoder"]


class MtebEncoder:
    """A model that ``mteb.evaluate`` takes.

    Queries and documents get the model's own prompts for them, other texts its default. ``model`` is a folder, a name
    or an ``Embedder``; ``revision`` and ``device`` are taken because mteb gives them.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Embedder = BUNDLED,
        revision: str | None = None,
        *,
        device: str | None = None,
    ) -> None:
        require("mteb", "mteb")
        self.embedder = opened(model)
        self._plain = SentenceEncoder(self.embedder)
        prompts = role_prompts(self.embedder.spec)
        self._prompts = {"query": prompts.query, "document": prompts.passage}

    @property
    def mteb_model_meta(self) -> Any:  # noqa: ANN401 - mteb is untyped here
        """What mteb files results under: the model's name, and the precision and SHA-256 of its graph as revision."""
        from mteb.models import ModelMeta

        spec = self.embedder.spec
        digest = spec.files[spec.graph].sha256[:12]
        empty = (
            "release_date",
            "n_parameters",
            "memory_usage_mb",
            "license",
            "open_weights",
            "public_training_code",
        )
        unknown = dict.fromkeys((*empty, "public_training_data", "training_datasets"))
        return ModelMeta(
            loader=None,
            name=f"qingyu/{spec.name}",
            revision=f"{spec.precision}-{digest}",
            languages=["zho-Hans"],
            max_tokens=spec.max_tokens,
            embed_dim=spec.dim,
            similarity_fn_name="cosine",
            use_instructions=bool(spec.prompts),
            framework=["ONNX"],
            **unknown,
        )

    def encode(
        self,
        inputs: Any,  # noqa: ANN401 - a torch DataLoader of batches with the key "text"
        *,
        task_metadata: Any,  # noqa: ANN401
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401 - mteb's own options of encoding
    ) -> Floats:
        """The vectors of all texts of the batches, float32 (n, dim)."""
        role = getattr(prompt_type, "value", prompt_type)
        texts = (text for batch in inputs for text in batch["text"])
        blocks = [
            block.vectors for block in self.embedder.embed_stream(texts, prompt=self._prompts.get(role))
        ]
        return np.concatenate(blocks) if blocks else self.embedder.embed([])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401
        """Cosines (n, m)."""
        return self._plain.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401
        """Cosines (n,)."""
        return self._plain.similarity_pairwise(embeddings1, embeddings2)
