"""An ``Embedder`` as LangChain's ``Embeddings``. Needs the extra ``langchain``, when this module is imported."""

from __future__ import annotations

import os

from qingyu.models.extras import require

require("langchain", "langchain_core")

from langchain_core.embeddings import Embeddings  # noqa: E402 - after the door

from qingyu.runtime.embedder import Embedder  # noqa: E402
from qingyu.runtime.integrations.common import opened, role_prompts  # noqa: E402
from qingyu.runtime.task import BUNDLED  # noqa: E402

__all__ = ["QingyuEmbeddings"]


class QingyuEmbeddings(Embeddings):  # type: ignore[misc] # untyped where it is not installed
    """Vectors of documents and of queries, each with the model's own prompt for them where it has one.

    ``model`` is a model folder, a name, or an ``Embedder``. A prompt that is given is used instead: a name or a text.
    The asynchronous methods are the base's own, which run these in a thread.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Embedder = BUNDLED,
        *,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
    ) -> None:
        self.embedder = opened(model)
        self._prompts = role_prompts(self.embedder.spec, query=query_prompt, passage=passage_prompt)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of documents."""
        vectors: list[list[float]] = self.embedder.embed(texts, prompt=self._prompts.passage).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        vector: list[float] = self.embedder.embed(text, prompt=self._prompts.query)[0].tolist()
        return vector
