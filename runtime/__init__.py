"""What runs at inference; imports numpy, onnxruntime, tokenizers and psutil, and nothing else of qingyu but errors."""
