"""Models run by OpenVINO: needs the extra ``openvino``, which is imported when a model is opened with it."""
