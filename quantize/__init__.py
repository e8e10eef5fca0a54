"""FP32 model folders become smaller and faster ones, each with a certificate of what that cost (extra ``quantize``).

Importing this package loads neither onnx nor onnxruntime; quantizing does.
"""

from __future__ import annotations

from qingyu.quantize.pipeline import Gate, Outcome, quantize, verify

__all__ = ["Gate", "Outcome", "quantize", "verify"]
