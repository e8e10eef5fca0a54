"""An ``Embedder`` as LlamaIndex's ``BaseEmbedding``. Needs the extra ``llama-index``, when this module is imported."""

from __future__ import annotations

import asyncio
import os

from qingyu.models.extras import require

require("llama-index", "llama_index")

from llama_index.core.base.embeddings.base import BaseEmbedding  # noqa: E402 - after the door
from llama_index.core.bridge.pydantic import PrivateAttr  # noqa: E402

from qingyu.runtime.embedder import Embedder  # noqa: E402
from qingyu.runtime.integrations.common import RolePrompts, opened, role_prompts  # noqa: E402
from qingyu.runtime.task import BUNDLED  # noqa: E402

__all__ = ["QingyuEmbedding"]

BATCH = 512  # texts that LlamaIndex hands over at once; ours are cut by tokens in any case


class QingyuEmbedding(BaseEmbedding):  # type: ignore[misc] # untyped where it is not installed
    """Vectors of texts and of queries, each with the model's own prompt for them where it has one.

    ``model`` is a model folder, a name, or an ``Embedder``. A prompt that is given is used instead: a name or a text.
    """

    _embedder: Embedder = PrivateAttr()
    _prompts: RolePrompts = PrivateAttr()

    def __init__(
        self,
        model: str | os.PathLike[str] | Embedder = BUNDLED,
        *,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        embed_batch_size: int = BATCH,
    ) -> None:
        embedder = opened(model)
        super().__init__(model_name=embedder.spec.name, embed_batch_size=embed_batch_size)
        self._embedder = embedder
        self._prompts = role_prompts(embedder.spec, query=query_prompt, passage=passage_prompt)

    @classmethod
    def class_name(cls) -> str:
        """The name by which LlamaIndex stores it."""
        return "QingyuEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._vectors([query], self._prompts.query)[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._vectors([text], self._prompts.passage)[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._vectors(texts, self._prompts.passage)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    def _vectors(self, texts: list[str], prompt: str) -> list[list[float]]:
        vectors: list[list[float]] = self._embedder.embed(texts, prompt=prompt).tolist()
        return vectors
