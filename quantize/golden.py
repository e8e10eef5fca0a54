"""Golden texts for a model's manifest: what ``qingyu.runtime.selfcheck`` tests a machine with.

What is compared on other machines are the FP32 model's vectors, and what is allowed there is a multiple of the
distance that quantization cost here. Measured with multilingual-e5-small-zh, row-wise INT8, 8 texts, onnxruntime 1.32,
as the least cosine with vectors of an AVX512-VNNI machine:

    ===================================== ================= ==================
    emulated CPU                          its INT8 vectors  its FP32 vectors
    ===================================== ================= ==================
    the same machine                      1                 0.99916
    Nehalem (SSE), Cortex-A53, A76, i8mm  0.99911           0.99916
    Haswell (AVX2, 16-bit pairs saturate) 0.99845           0.99848
    a wrong kernel (SME, another file)                      0.67
    ===================================== ================= ==================

So an honest kernel rounds differently by as much as INT8 itself costs, yet stays as far from FP32 as every other: only
against FP32 is there a narrow range to expect. On the golden texts below, all those CPUs but Haswell came within a
tenth of the distance measured here; Haswell had 1.3 times the distance (e5) and 2.4 times (random weights of the
bge-small-zh shape). That was before the engine asked such CPUs for exact products; it still is so where a CPU's flags
cannot be read, and is no reason to refuse the machine. Four times is more than any of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qingyu.errors import FidelityError, InvalidOptionError
from qingyu.runtime.spec import GOLDEN_TEXTS as MOST_TEXTS
from qingyu.runtime.spec import LEAST_COSINES, Golden, decode_vector, encode_vector
from qingyu.runtime.task import TaskModel

__all__ = ["GOLDEN_TEXTS", "make_golden"]

# Of different lengths, so that different kernels and their tails run. No full-width comma or the like: with
# unicode_form="NFKC" the same tokens must come of them.
GOLDEN_TEXTS = (
    "今天天气真好",
    "忘记登录密码怎么办",
    "用 Python 3.11 读取 CSV 文件的方法",
    "买方应当在收到货物后十五个工作日内支付全部货款。逾期付款的每日按未付金额的万分之五支付违约金。争议提交北京仲裁委员会。",
)

ALLOWANCE = 4.0  # times the cosine distance measured here
LEAST_ALLOWED = 5e-4  # cosine distance, for models whose own is near nothing

Vectors = NDArray[np.float64]


def make_golden(candidate: TaskModel, reference: TaskModel, *, texts: Sequence[str] = GOLDEN_TEXTS) -> Golden:
    """The golden texts of the model ``candidate``, with the vectors of its FP32 original ``reference``.

    Of models with a head, vectors are the states of the first token.

    ``reference`` may be ``candidate`` itself, for an FP32 model. Raises ``FidelityError`` when the two are so far
    apart that the check would let anything pass, and ``InvalidOptionError`` for texts that cannot be used.
    """
    _check_texts(texts)
    expected = [encode_vector(vector.tolist()) for vector in _alone(reference, texts)]
    decoded = np.array([decode_vector(vector, reference.spec.dim) for vector in expected])
    distance = float(np.max(1 - _cosines(decoded, _alone(candidate, texts))))
    lowest, highest = LEAST_COSINES
    least = round(1 - max(ALLOWANCE * distance, LEAST_ALLOWED), 6)
    if not least >= lowest:
        raise FidelityError(
            f"{candidate.spec.name} is too far from FP32 to have golden texts",
            expected=f"a cosine distance of at most {(1 - lowest) / ALLOWANCE:g}",
            found=f"{distance:.4g}",
            remedy="Quantize with a more faithful recipe.",
        )
    return Golden(tuple(texts), tuple(expected), min(least, highest))


def _alone(model: TaskModel, texts: Sequence[str]) -> Vectors:
    """Unit vectors float64 (n, dim), each text run alone and without a prompt, as the check runs them."""
    return np.array([model.probe(text) for text in texts], dtype=np.float64)


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Vectors = np.einsum("nd,nd->n", a, b) / lengths
    return cosines


def _check_texts(texts: Sequence[str]) -> None:
    unstable = [text for text in texts if unicodedata.normalize("NFKC", text) != text or "[" in text]
    if unstable or not 1 <= len(texts) <= MOST_TEXTS:
        raise InvalidOptionError(
            "golden texts",
            expected=f"1 to {MOST_TEXTS} texts that NFKC does not change, and no brackets",
            found=repr(unstable[0]) if unstable else f"{len(texts)} texts",
            remedy="Use 。 and 、 instead of full-width commas.",
        )
