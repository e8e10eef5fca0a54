"""What the layout promises: who imports whom, what is public, what is loaded, and what is in the wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import qingyu
from qingyu import errors

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# import name -> folder; pyproject's table of the same is compared with it below.
FOLDERS = {
    "qingyu": ROOT / "src" / "qingyu",
    "qingyu.runtime": ROOT / "runtime",
    "qingyu.quantize": ROOT / "quantize",
    "qingyu.models": ROOT / "models",
    "qingyu.bench": ROOT / "bench",
}
LEFTOVERS = ("__pycache__", ".pyc")


def module_name(path: Path) -> str:
    folder, package = next((f, p) for p, f in FOLDERS.items() if path.is_relative_to(f))
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    """Every file under the mapped folders, whatever its kind."""
    found = [path for folder in FOLDERS.values() for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if not any(part in str(path) for part in LEFTOVERS))


MODULES = {module_name(path): path for path in source_files() if path.suffix == ".py"}
PACKAGES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


def imports(tree: ast.AST) -> set[str]:
    """Names of the modules that a piece of code imports, in functions, too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def imports_when_loaded(path: Path) -> set[str]:
    """What a module imports before any of its functions is called, type checking left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name is ast's

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return imports(Outside().visit(tree))


def imports_of(module: str) -> set[str]:
    return imports(ast.parse(MODULES[module].read_text(encoding="utf-8")))


def of_ours(found: set[str]) -> set[str]:
    return {name for name in found if name.partition(".")[0] == "qingyu"}


def inside(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in allowed)


# Folder -> what of ours it may import besides itself. "qingyu" alone is the package, for its __version__.
ALLOWED = {
    "qingyu.runtime.stores": ("qingyu.errors", "qingyu.runtime", "qingyu.models.extras"),
    "qingyu.runtime.integrations": ("qingyu.errors", "qingyu.runtime", "qingyu.models.extras"),
    "qingyu.runtime.bulk": ("qingyu.errors", "qingyu.runtime", "qingyu.models.extras"),
    "qingyu.runtime.serve": ("qingyu.errors", "qingyu.runtime"),
    "qingyu.runtime.search": ("qingyu.errors", "qingyu.runtime", "qingyu.models.extras"),
    "qingyu.runtime.openvino": ("qingyu.errors", "qingyu.runtime"),
    "qingyu.runtime": ("qingyu.errors",),
    "qingyu.models.adapt": (
        "qingyu.errors",
        "qingyu.runtime",
        "qingyu.models.export",
        "qingyu.models.extras",
    ),
    # The cache is written by models and read by runtime: both must call the same home safe.
    "qingyu.models": ("qingyu.errors", "qingyu.runtime.spec", "qingyu.runtime.home"),
    "qingyu.quantize": ("qingyu.errors", "qingyu.runtime", "qingyu.models"),
    "qingyu.bench": ("qingyu.errors", "qingyu.runtime", "qingyu.models", "qingyu.quantize"),
    "qingyu.errors": (),
    # `qingyu bench` and `qingyu doctor --measure` are that one measurement.
    "qingyu.cli": (
        "qingyu.errors",
        "qingyu.runtime",
        "qingyu.models",
        "qingyu.quantize",
        "qingyu.bench.on_device",
    ),
    "qingyu.__main__": ("qingyu.errors", "qingyu.cli"),
    "qingyu": ("qingyu.errors", "qingyu.runtime"),
}


def layer_of(module: str) -> str:
    return next(layer for layer in ALLOWED if inside(module, (layer,)))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_layer_may(module):
    layer = layer_of(module)
    allowed = (*ALLOWED[layer], layer) if layer != "qingyu" else ALLOWED[layer]
    wrong = {name for name in of_ours(imports_of(module)) if name != "qingyu" and not inside(name, allowed)}
    assert not wrong, f"{module} is in {layer}, which may import {', '.join(allowed)}"


def test_the_package_itself_is_imported_for_its_version_only():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "qingyu":
                names = {alias.name for alias in node.names if f"qingyu.{alias.name}" not in MODULES}
                assert names <= {"__version__"}, module


def test_nothing_imports_bench_but_the_commands_that_measure():
    users = [name for name in MODULES if layer_of(name) != "qingyu.bench"]
    found = [name for name in users if any(inside(i, ("qingyu.bench",)) for i in imports_of(name))]
    assert found == ["qingyu.cli.bench", "qingyu.cli.doctor"]


def test_the_command_line_loads_the_other_layers_inside_functions_only():
    lazily = ("qingyu.runtime", "qingyu.models", "qingyu.quantize", "qingyu.bench")
    for module in MODULES:
        if layer_of(module) in ("qingyu.cli", "qingyu.__main__", "qingyu"):
            loaded = {name for name in imports_when_loaded(MODULES[module]) if inside(name, lazily)}
            assert not loaded, module


# Third-party packages, by layer, at load time and in functions.
RUNTIME_PACKAGES = {"numpy", "onnxruntime", "tokenizers", "psutil"}
# The door of an extra: one module, which imports it in a function only, for an option that is off unless asked for.
# It stands in the runtime because the conversion has to happen between the caller's text and the tokenizer's spans.
RUNTIME_EXTRAS = {"qingyu.runtime.scripts": {"opencc"}}


def third_party(found: set[str]) -> set[str]:
    names = {name.partition(".")[0] for name in found}
    return names - set(sys.stdlib_module_names) - {"qingyu"}


# Subpackages of the runtime with an extra of their own: what they alone may import, in functions only.
EXTRAS = {
    "qingyu.runtime.search": {"usearch", "jieba"},
    "qingyu.runtime.bulk": {"ray", "pyarrow"},
    "qingyu.runtime.openvino": {"openvino"},
    "qingyu.runtime.stores.milvus": {"pymilvus", "grpc"},
    "qingyu.runtime.stores.qdrant": {"qdrant_client", "httpx"},
    "qingyu.runtime.stores": set(),
}


@pytest.mark.parametrize("subpackage", sorted(EXTRAS))
def test_no_other_part_of_the_runtime_imports_a_subpackage_with_an_extra(subpackage):
    others = [name for name in MODULES if layer_of(name) == "qingyu.runtime"]
    assert not [name for name in others if any(inside(i, (subpackage,)) for i in imports_of(name))]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if inside(name, tuple(EXTRAS))))
def test_a_subpackage_with_an_extra_imports_it_in_functions_only(module):
    extra = next(packages for name, packages in EXTRAS.items() if inside(module, (name,)))
    assert third_party(imports_of(module)) <= RUNTIME_PACKAGES | extra
    assert third_party(imports_when_loaded(MODULES[module])) <= {"numpy", "psutil"}


# Classes that other libraries ask for must have those libraries' own as their base, so these modules load them at once,
# after the door of their extra, and nothing else of ours loads these modules.
INTEGRATIONS = {
    "qingyu.runtime.integrations.langchain": {"langchain_core"},
    "qingyu.runtime.integrations.llama_index": {"llama_index"},
    "qingyu.runtime.integrations.mteb": {"mteb"},
    "qingyu.runtime.integrations.sentence_transformers": {"torch"},
    "qingyu.runtime.integrations.common": set(),
    "qingyu.runtime.integrations": set(),
}
BASED = ("qingyu.runtime.integrations.langchain", "qingyu.runtime.integrations.llama_index")


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if inside(name, ("qingyu.runtime.integrations",)))
)
def test_an_integration_uses_its_library_and_the_packages_of_the_runtime_only(module):
    assert third_party(imports_of(module)) <= RUNTIME_PACKAGES | INTEGRATIONS[module]
    at_once = INTEGRATIONS[module] if module in BASED else set()
    assert third_party(imports_when_loaded(MODULES[module])) <= {"numpy", "psutil"} | at_once


def test_nothing_of_ours_loads_an_integration_but_a_measurement():
    users = [name for name in MODULES if not inside(name, ("qingyu.runtime.integrations", "qingyu.bench"))]
    assert not [name for name in users if any(inside(i, tuple(INTEGRATIONS)) for i in imports_of(name))]


# The server is loaded by its command alone, after the door of its extra; so it may load its packages at once.
SERVE = "qingyu.runtime.serve"
SERVE_PACKAGES = {"uvicorn", "uvloop", "httptools", "orjson", "prometheus_client"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if inside(name, (SERVE,))))
def test_the_server_uses_the_packages_of_its_extra_and_those_of_the_runtime_only(module):
    assert third_party(imports_of(module)) <= RUNTIME_PACKAGES | SERVE_PACKAGES


def test_nothing_loads_the_server_but_its_command_inside_a_function():
    users = {name for name in MODULES if layer_of(name) != SERVE}
    users = {name for name in users if any(inside(i, (SERVE,)) for i in imports_of(name))}
    assert {name for name in users if layer_of(name) != "qingyu.bench"} == {"qingyu.cli.serve"}
    assert not [i for i in imports_when_loaded(MODULES["qingyu.cli.serve"]) if inside(i, (SERVE,))]


@pytest.mark.parametrize("module", sorted(name for name in MODULES if layer_of(name) == "qingyu.runtime"))
def test_the_runtime_uses_its_four_packages_only(module):
    assert third_party(imports_of(module)) <= RUNTIME_PACKAGES | RUNTIME_EXTRAS.get(module, set())
    # The two large ones are loaded when a model is opened.
    assert third_party(imports_when_loaded(MODULES[module])) <= {"numpy", "psutil"}


def test_the_guard_sees_a_forbidden_import():
    """The parser is not blind: an import in a function and one of a submodule's name are both seen."""
    code = "def f():\n    from qingyu import bench\n    import qingyu.models.export as e\n"
    assert imports(ast.parse(code)) == {"qingyu.bench", "qingyu.models.export"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name != "qingyu.__main__"))
def test_a_module_imports_cleanly_and_all_of_its_public_names_exist(module):
    """Warnings are errors here, too. A module without its extra is skipped by name."""
    try:
        loaded = importlib.import_module(module)
    except errors.MissingExtraError as error:
        pytest.skip(str(error))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("onnx", "safetensors", "torch", "optimum", *SERVE_PACKAGES):
            pytest.skip(f"needs {error.name}")
        raise
    public = getattr(loaded, "__all__", [])
    assert len(set(public)) == len(public)
    assert not [name for name in public if not hasattr(loaded, name)]


def test_public_names_of_the_face_are_what_can_be_imported():
    assert dir(qingyu) == sorted(qingyu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        _ = qingyu.Embeder


KINDS = sorted(
    (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__),
    key=lambda kind: kind.__name__,
)
ERRORS = [kind for kind in KINDS if not issubclass(kind, Warning)]


def test_all_of_errors_is_every_class_in_it():
    assert sorted(errors.__all__) == [kind.__name__ for kind in KINDS]
    assert all(issubclass(kind, errors.QingyuError) for kind in ERRORS)
    # The drawing at the top of the module is the tree.
    drawn = re.findall(r"\b\w+Error\b", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in ERRORS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_says_expected_found_and_remedy_also_after_pickling(kind):
    error = kind("the budget is too small", expected="600 MB", found="400 MB", remedy="Raise it by 200.")
    text = "the budget is too small: expected 600 MB, found 400 MB. Raise it by 200."
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == text
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert kind.__doc__


def test_an_error_cannot_be_raised_without_its_parts():
    with pytest.raises(TypeError):
        errors.QingyuError("only a problem")


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(qingyu.__file__).parents[1])}
    arguments = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_itself_its_errors_and_the_standard_library_only():
    code = "import sys\nbefore = set(sys.modules)\nimport qingyu\nprint(*(set(sys.modules) - before))"
    loaded = set(run_python(code).split())
    assert of_ours(loaded) == {"qingyu", "qingyu.errors"}
    assert not third_party(loaded)


def test_the_public_class_loads_neither_onnxruntime_nor_tokenizers_nor_tests_of_numpy():
    code = "import sys\nfrom qingyu import Embedder, ModelSpec\nprint(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "qingyu.runtime.embedder" in loaded
    wanted = {"onnxruntime", "tokenizers", "onnx", "safetensors", "torch", "numpy.testing", "pytest"}
    assert not loaded & wanted
    assert not {name for name in loaded if name.startswith("numpy.") and ".tests" in name}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table_of_packages() -> list[str]:
    block = re.search(r"^packages = \[\n(.*?)^\]", CONFIGURATION, re.MULTILINE | re.DOTALL)
    assert block
    return re.findall(r'"([\w.]+)"', block[1])


def test_pyproject_lists_every_package_and_where_it_lies():
    assert sorted(table_of_packages()) == PACKAGES
    mapped = dict(re.findall(r'^"(qingyu[\w.]*)" = "([\w/]+)"$', CONFIGURATION, re.MULTILINE))
    assert {name: ROOT / folder for name, folder in mapped.items()} == FOLDERS


def test_the_version_is_stated_alike_everywhere():
    stated = re.search(r'^version = "(.+)"$', CONFIGURATION, re.MULTILINE)
    assert stated
    assert stated[1] == qingyu.__version__
    # Run from the source folders, nothing is installed.
    assert installed("qingyu") in (None, qingyu.__version__)


def tracked_files() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and its checkout, to tell source files from leftovers")
    # A path beside "ls-files" keeps a checkout inside another one out of it.
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> tuple[zipfile.ZipFile, list[str]]:
    """The wheel built from a copy of the tracked files, and their names."""
    found = installed("setuptools") or "none"
    if found == "none" or int(found.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or later, which knows licence expressions; found {found}")
    tracked = tracked_files()
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))), tracked


def in_wheel(name: str) -> str | None:
    """Where a tracked file belongs in the wheel, or ``None``."""
    path = ROOT / name
    for package, folder in FOLDERS.items():
        if path.is_relative_to(folder):
            return f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
    return None


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel):
    archive, tracked = wheel
    wanted = {name for name in map(in_wheel, tracked) if name is not None}
    held = set(archive.namelist())
    metadata = f"qingyu-{qingyu.__version__}.dist-info/"
    assert {name for name in held if not name.startswith(metadata)} == wanted
    assert {"qingyu/py.typed", "qingyu/runtime/spec.py", "qingyu/models/export/graph.py"} <= wanted


def test_the_wheel_holds_the_licence_files_as_they_are(wheel):
    archive, tracked = wheel
    licences = [name for name in ("LICENSE", "NOTICE") if name in tracked]
    assert "LICENSE" in licences
    for name in licences:
        inner = f"qingyu-{qingyu.__version__}.dist-info/licenses/{name}"
        assert archive.read(inner) == (ROOT / name).read_bytes()


def test_the_wheel_takes_at_most_17_megabytes_with_its_model(wheel):
    archive, _ = wheel
    assert "qingyu/runtime/bundled/qingyu-mini-zh/model.onnx" in archive.namelist()
    assert Path(str(archive.filename)).stat().st_size <= 17_000_000


def test_the_wheel_starts_the_command_line(wheel, tmp_path):
    """Unpacked alone, without the checkout on the path."""
    archive, _ = wheel
    archive.extractall(tmp_path)
    entry = archive.read(f"qingyu-{qingyu.__version__}.dist-info/entry_points.txt").decode()
    assert "qingyu = qingyu.__main__:main" in entry
    done = subprocess.run(
        [sys.executable, "-m", "qingyu", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "embed" in done.stdout
