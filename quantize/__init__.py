"""FP32 model folders become smaller and faster ones, each with a certificate of what that cost (extra ``quantize``).

Importing this package loads neither onnx nor onnxruntime; quantizing does.
"""

from __future__ import annotations

from qingyu.quantize.pipeline import Gate, Outcome, quantize, verify
from qingyu.quantize.tasks import TaskCertificate, TaskGate, TaskOutcome, quantize_task, verify_task

__all__ = [
    "Gate",
    "Outcome",
    "TaskCertificate",
    "TaskGate",
    "TaskOutcome",
    "quantize",
    "quantize_task",
    "verify",
    "verify_task",
]
