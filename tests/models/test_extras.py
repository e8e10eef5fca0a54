"""An optional dependency that is missing is one error with the command that brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qingyu.errors import MissingExtraError
from qingyu.models.extras import require


def test_a_missing_package_is_named_with_the_pip_command():
    with pytest.raises(MissingExtraError) as caught:
        require("export", "json", "no_such_package", "no_such_parent.child")
    assert str(caught.value) == (
        "the extra 'export' is not installed: expected the packages json, no_such_package, no_such_parent.child, "
        'found no no_such_package, no_such_parent.child. Run: pip install "qingyu[export]"'
    )


def test_what_is_there_is_not_imported():
    code = "import sys; from qingyu.models.extras import require; require('x', 'wave')"
    code += "; assert 'wave' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_exporter_loads_no_optional_package():
    heavy = ("onnx", "safetensors", "torch", "transformers", "optimum", "onnxruntime", "tokenizers")
    code = f"import sys, qingyu.models.export; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
