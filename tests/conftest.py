"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

# Before any test imports onnxruntime, which then starts no telemetry thread.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def qingyu_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What models note about this machine goes to a folder of the test run, not into the user's own."""
    os.environ["QINGYU_HOME"] = str(tmp_path_factory.mktemp("home"))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(
            f"needs {name}/ of the shared files, which lie beside the checkout where they are at hand"
        )
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real checkpoints and tokenizers beside the checkout."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of texts and measuring sets beside the checkout."""
    return _shared("data")


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += list("，。！？：；、“”（）,.!?()[]-") + list("0123456789") + list("abcdefghijklmnopqrstuvwxyz")
VOCABULARY += ["##" + c for c in "0123456789abcdefghijklmnopqrstuvwxyz"]
VOCABULARY += sorted(
    set(
        "今天气真好外面阳光明媚股票大跌怎么修改登录密码忘记了办雨会下吗人工智能正在变医疗教育和交通我们你他她它的是不有"
        "这那中国北京上海城市学生老师公司产品价格服务电影音乐书读写说话查询段落听看想爱吃喝走跑来去开关高低长短多少新旧快慢轻语言"
    )
)
TINY_LENGTH = 64


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights in sentence-transformers layout: real in every respect but size."""
    np = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-zh"
    folder.mkdir()
    hidden, wide, layers = 32, 64, 2
    random = np.random.default_rng(7)

    def normal(*shape: int) -> object:
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights = {
        "embeddings.word_embeddings.weight": normal(len(VOCABULARY), hidden),
        "embeddings.position_embeddings.weight": normal(TINY_LENGTH, hidden),
        "embeddings.token_type_embeddings.weight": normal(2, hidden),
        "embeddings.LayerNorm.weight": 1 + normal(hidden),
        "embeddings.LayerNorm.bias": normal(hidden),
    }
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        shapes = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (wide, hidden),
            "output.dense": (hidden, wide),
        }
        for name, shape in shapes.items():
            weights[f"{prefix}.{name}.weight"] = normal(*shape)
            weights[f"{prefix}.{name}.bias"] = normal(shape[0])
        for name in ("attention.output", "output"):
            weights[f"{prefix}.{name}.LayerNorm.weight"] = 1 + normal(hidden)
            weights[f"{prefix}.{name}.LayerNorm.bias"] = normal(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    documents = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": len(VOCABULARY),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": wide,
            "hidden_act": "gelu",
            "max_position_embeddings": TINY_LENGTH,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        "tokenizer_config.json": {
            "do_lower_case": False,
            "tokenizer_class": "BertTokenizer",
            "model_max_length": TINY_LENGTH,
        },
        "sentence_bert_config.json": {"max_seq_length": TINY_LENGTH, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "查询："}, "default_prompt_name": None},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


HEADS = {
    # Task: the class of transformers, and the shapes of its head in hidden sizes (0), labels (1) and words (2).
    "fill-mask": (
        "BertForMaskedLM",
        {
            "cls.predictions.transform.dense.weight": (0, 0),
            "cls.predictions.transform.dense.bias": (0,),
            "cls.predictions.transform.LayerNorm.weight": (0,),
            "cls.predictions.transform.LayerNorm.bias": (0,),
            "cls.predictions.bias": (2,),
        },
    ),
    "classification": (
        "BertForSequenceClassification",
        {"bert.pooler.dense.weight": (0, 0), "bert.pooler.dense.bias": (0,), "classifier.weight": (1, 0)}
        | {"classifier.bias": (1,)},
    ),
    "tagging": ("BertForTokenClassification", {"classifier.weight": (1, 0), "classifier.bias": (1,)}),
    "question-answering": (
        "BertForQuestionAnswering",
        {"qa_outputs.weight": (1, 0), "qa_outputs.bias": (1,)},
    ),
}
HEADS["reranking"] = HEADS["classification"]


@pytest.fixture(scope="session")
def head_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the tiny BERT with a random head as transformers saves it, for a task and labels."""
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")

    def make(
        task: str, labels: Sequence[str] = (), *, more: Mapping[str, object] | None = None, **config: object
    ) -> Path:
        folder = tmp_path_factory.mktemp("heads") / f"tiny-{task}"
        folder.mkdir()
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoint / name, folder / name)
        document = json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8"))
        names = labels or {"reranking": ["LABEL_0"]}.get(task, ["LABEL_0", "LABEL_1"])
        kind, shapes = HEADS[task]
        numbered = {str(number): label for number, label in enumerate(names)}
        document |= {"architectures": [kind], "id2label": numbered, **config}
        document["label2id"] = {label: int(number) for number, label in numbered.items()}
        (folder / "config.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        encoder = safetensors.load_file(tiny_checkpoint / "model.safetensors")
        sizes = (document["hidden_size"], len(names), document["vocab_size"])
        random = numpy.random.default_rng(3)
        head = {
            name: random.normal(0, 0.5, [sizes[axis] for axis in axes]).astype(numpy.float32)
            for name, axes in shapes.items()
        }
        weights = {f"bert.{name}": weight for name, weight in encoder.items()} | head | dict(more or {})
        safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def head_model(
    head_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function that gives the FP32 model folder of ``head_checkpoint``, made once for the same arguments."""
    pytest.importorskip("onnx")
    from qingyu.models.export import export

    made: dict[tuple[object, ...], Path] = {}

    def make(task: str, labels: Sequence[str] = (), **config: object) -> Path:
        key = (task, tuple(labels), *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("head-models") / task
            export(head_checkpoint(task, labels, **config), folder, task=task)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an FP32 model folder. Read it, never change it."""
    pytest.importorskip("onnx")
    from qingyu.models.export import export

    folder = tmp_path_factory.mktemp("models") / "tiny"
    export(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_int8(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized. Read it, never change it."""
    from qingyu.quantize import quantize

    folder = tmp_path_factory.mktemp("models") / "tiny-int8"
    quantize(tiny_model, folder, texts=["今天天气真好", "外面阳光明媚", "股票大跌", "怎么修改登录密码"])
    return folder


@pytest.fixture(scope="session")
def e5_model(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """multilingual-e5-small-zh, the real Chinese checkpoint, as an FP32 model folder."""
    pytest.importorskip("onnx")
    from qingyu.models.export import export

    folder = tmp_path_factory.mktemp("models") / "e5"
    export(shared_models / "multilingual-e5-small-zh", folder)
    return folder


@pytest.fixture
def hub(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A loopback server (tests/support/hub.py) with the tiny checkpoint as someone/tiny-zh, and no other source."""
    path = Path(__file__).parent / "support" / "hub.py"
    spec = importlib.util.spec_from_file_location("support_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "support_hub", module)  # dataclasses look it up there
    spec.loader.exec_module(module)
    server = module.Hub("someone/tiny-zh", tiny_checkpoint)
    server.Faults = module.Faults
    for name in ("HF_ENDPOINT", "QINGYU_MIRROR", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, server.url)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "QINGYU_CATALOGUE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()
