"""The manifest of a model folder, ``qingyu.json``: every fact about a model that the code needs, as data.

Not here: reading checkpoints (``qingyu.models``) and opening graphs (``qingyu.runtime.engine``).
"""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
import json
import math
import re
import struct
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from qingyu.errors import CorruptFileError, InvalidOptionError, ManifestError, ModelNotFoundError

__all__ = [
    "MANIFEST",
    "Architecture",
    "EdgeFile",
    "FileRecord",
    "Golden",
    "ModelSpec",
    "OpenVinoFile",
    "ScoreFunction",
    "Source",
    "Task",
    "decode",
    "decode_vector",
    "encode_vector",
    "read_spec",
    "sha256_of",
]

D = TypeVar("D")

MANIFEST = "qingyu.json"
FORMAT = 1
MANIFEST_LIMIT = 4 << 20  # a manifest is a few kilobytes; anything near this is not one

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Task = Literal["embedding", "fill-mask", "classification", "tagging", "question-answering", "reranking"]
ScoreFunction = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the encoder, as the checkpoint's config.json states them."""

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: str
    layer_norm_eps: float


@dataclass(frozen=True)
class Source:
    """Where the weights came from; ``None`` where the checkpoint does not say."""

    repository: str | None = None
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 lower-case hexadecimal digits) of one file of the model folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Golden:
    """Texts whose vectors are known, to test a machine with before its vectors are trusted.

    ``vectors``: for each text the FP32 model's unit vector, as ``encode_vector`` writes it. ``least_cosine``: how
    close this model's vector of every text, run alone and without a prompt, must come.
    """

    texts: tuple[str, ...]
    vectors: tuple[str, ...]
    least_cosine: float


@dataclass(frozen=True)
class EdgeFile:
    """The same graph in onnxruntime's own format, and the session options to open it with, each "0" or "1".

    ``heads_at_once`` is how many heads' attention scores a run holds at once; ``None`` is all.
    """

    file: str
    session: Mapping[str, str] = field(default_factory=dict)
    heads_at_once: int | None = None


@dataclass(frozen=True)
class OpenVinoFile:
    """The same model quantized for OpenVINO.

    ``least_cosine`` is what ``Golden`` has for the other graph, ``certificate`` this file measured against FP32, and
    ``speed`` how many times as fast it was as the other graph, texts to vectors, in one interleaved run on the CPU that
    the certificate names; ``None`` is not measured.
    """

    file: str
    least_cosine: float
    certificate: Mapping[str, Any] | None = None
    speed: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One model folder, described.

    ``max_tokens`` counts the special tokens. ``lowercase`` is informative: the front end is whole in
    tokenizer.json. ``prompts`` maps a prompt name to the text put before each input. ``inputs`` and
    ``outputs`` are the graph's own names, the outputs among ``token_states`` (rows, tokens, hidden),
    ``pooled`` (rows, dim) and ``hidden_state_0`` ... ``hidden_state_<layers>`` (rows, tokens, hidden). Of models
    with a head, whose ``dim`` is the hidden size and which have no use for pooling and normalization, there are
    instead of ``pooled`` the ``logits`` (rows, labels), ``token_logits`` (rows, tokens, labels) or ``mask_logits``
    (masks, vocabulary), and instead of ``token_states`` there may be ``chosen_states`` (rows or masks, hidden), those
    that the head reads; ``labels`` names the labels, and ``scores`` is the function from logits to scores.
    ``files`` names every file that may be read. ``certificate`` is INT8 measured against FP32, as JSON.
    ``weight_bits`` is the width of quantized weights, ``float_layers`` names the linear layers that stayed FP32.
    ``golden`` are texts to test a machine with, ``fallback`` names an FP32 graph for machines that fail, and ``edge``
    the file for the profile of that name; ``openvino`` the file for the engine of that name.
    """

    name: str
    task: Task
    architecture: Architecture
    dim: int
    max_tokens: int
    pooling: Pooling
    normalize: bool
    lowercase: bool
    graph: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: Precision
    recipe: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    source: Source = field(default_factory=Source)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    weight_bits: int | None = None
    float_layers: tuple[str, ...] = ()
    golden: Golden | None = None
    fallback: str | None = None
    edge: EdgeFile | None = None
    openvino: OpenVinoFile | None = None
    labels: tuple[str, ...] = ()
    scores: ScoreFunction = "softmax"

    def to_json(self) -> str:
        """The manifest as JSON text, ending in a newline; ``from_json`` reads it back unchanged."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False) + "\n"

    def prompt_text(self, prompt: str | None) -> str:
        """What is put before each text for the option ``prompt``: a name's text, or the option as it stands.

        ``None`` is the default prompt. "query" and "passage" are names even where the model has neither, and then
        raise ``InvalidOptionError``.
        """
        name = self.default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name in self.prompts:
            return self.prompts[name]
        if name in ("query", "passage"):
            raise InvalidOptionError(
                f"{self.name} has no prompt {name!r}",
                expected=f"one of {sorted(self.prompts)}" if self.prompts else "no prompt",
                found=repr(name),
                remedy="Pass the prompt's text itself, or name it at export with --prompt NAME=TEXT.",
            )
        return name

    def width(self, dim: int | None) -> int:
        """How many values a vector keeps for the option ``dim``; ``InvalidOptionError`` out of its range."""
        if dim is None:
            return self.dim
        if not 1 <= dim <= self.dim:
            raise InvalidOptionError(
                "dim",
                expected=f"1 to {self.dim}",
                found=str(dim),
                remedy=f"{self.name} has {self.dim} dimensions.",
            )
        return dim

    @classmethod
    def from_json(cls, text: str, *, origin: str = MANIFEST) -> ModelSpec:
        """A spec from manifest text; ``ManifestError`` names the field that is wrong, and ``origin``."""
        document = _parse(text, origin)
        version = document.pop("format", None)
        if version != FORMAT:
            _refuse(origin, "format", f"{FORMAT}", repr(version), "Use the qingyu version that wrote it.")
        spec = _decode(cls, document, origin, "")
        assert isinstance(spec, cls)
        _check(spec, origin)
        return spec


def read_spec(folder: Path) -> ModelSpec:
    """The manifest of a model folder, or a typed error saying what is there instead."""
    path = folder / MANIFEST
    remedy = "Make one with `qingyu export CHECKPOINT FOLDER`."
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise ModelNotFoundError(
            f"no model at {folder}", expected="a model folder", found=found, remedy=remedy
        )
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder"
        raise ModelNotFoundError(f"no model in {folder}", expected=MANIFEST, found=found, remedy=remedy)
    if path.stat().st_size > MANIFEST_LIMIT:
        raise ManifestError(
            f"{path} is too large",
            expected=f"at most {MANIFEST_LIMIT} bytes",
            found=f"{path.stat().st_size} bytes",
            remedy="Export the model again.",
        )
    with _reading(path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not text", expected="UTF-8", found=str(error), remedy="Export the model again."
        ) from None
    return ModelSpec.from_json(text, origin=str(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in lower-case hexadecimal, read in pieces of 256 KiB."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(1 << 18))  # one for all: a tenth faster than making each anew
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def encode_vector(values: Sequence[float]) -> str:
    """A vector as base64 of little-endian float16, 1.4 characters a byte; the cosine changes by less than 1e-6.

    >>> encode_vector([1.0, -0.5])
    'ADwAuA=='
    """
    return binascii.b2a_base64(struct.pack(f"<{len(values)}e", *values), newline=False).decode("ascii")


def decode_vector(text: str, dim: int) -> tuple[float, ...]:
    """The ``dim`` values that ``encode_vector`` wrote; ``ValueError`` for anything that it does not write.

    >>> decode_vector("ADwAuA==", 2)
    (1.0, -0.5)
    """
    size = 2 * dim
    length = 4 * -(-size // 3)
    if len(text) != length:  # before decoding: the text may be of any size
        raise ValueError(f"{len(text)} characters instead of {length}")
    data = binascii.a2b_base64(text.encode("ascii", "replace"))
    if binascii.b2a_base64(data, newline=False) != text.encode("utf-8", "replace") or len(data) != size:
        raise ValueError("not base64")
    return struct.unpack(f"<{dim}e", data)


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Raise ``CorruptFileError`` unless the file has the size and hash that the manifest gives."""
    path = folder / name
    with _reading(path):
        _check_size(path, record)
        _check_digest(path, sha256_of(path), record)


def read_checked(folder: Path, name: str, record: FileRecord) -> bytes:
    """The bytes of a file, or ``CorruptFileError`` as from ``check_file``.

    What was hashed is what is returned, so a file that is replaced meanwhile is not let in.
    """
    path = folder / name
    with _reading(path):
        _check_size(path, record)
        with path.open("rb") as stream:
            data = stream.read(record.bytes + 1)
        _check_digest(path, hashlib.sha256(data).hexdigest(), record)
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorruptFileError(
            f"{path} cannot be read",
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            remedy="Make the folder and the file readable for this user.",
        ) from None


_DAMAGED = "The file is damaged or was replaced: export, quantize or copy the model again."


def _check_size(path: Path, record: FileRecord) -> None:
    # A pipe or a device is never opened: reading it might not end.
    size = path.stat().st_size if path.is_file() else None
    if size != record.bytes:
        absent = "something that is not a file" if path.exists() else "no such file"
        raise CorruptFileError(
            f"{path} is damaged",
            expected=f"{record.bytes} bytes",
            found=absent if size is None else f"{size} bytes",
            remedy=_DAMAGED,
        )


def _check_digest(path: Path, digest: str, record: FileRecord) -> None:
    if digest != record.sha256:
        raise CorruptFileError(
            f"{path} is damaged",
            expected=f"sha256 {record.sha256}",
            found=f"sha256 {digest}",
            remedy=_DAMAGED,
        )


def _refuse(origin: str, where: str, expected: str, found: str, remedy: str) -> NoReturn:
    raise ManifestError(f"{origin}: field {where!r}", expected=expected, found=found, remedy=remedy)


def _parse(text: str, origin: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key that occurs twice")
        return document

    def constant(name: str) -> NoReturn:
        raise ValueError(f"the number {name}")

    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        found = str(error) or type(error).__name__
        raise ManifestError(
            f"{origin} is not a manifest", expected="JSON", found=found, remedy="Export the model again."
        ) from None
    if not isinstance(document, dict):
        raise ManifestError(
            f"{origin} is not a manifest",
            expected="a JSON object",
            found=type(document).__name__,
            remedy="Export the model again.",
        )
    return document


def decode(kind: type[D], document: Any, *, origin: str) -> D:  # noqa: ANN401 - JSON values
    """A dataclass from parsed JSON, each value of its field's type; ``ManifestError`` names what is not."""
    decoded = _decode(kind, document, origin, "")
    assert isinstance(decoded, kind)
    return decoded


def _decode(kind: Any, value: Any, origin: str, where: str) -> Any:  # noqa: ANN401 - JSON in, any field type out
    """``value`` as the annotated type ``kind``: dataclasses, tuples, mappings, literals, unions and scalars."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, origin, where)
    shape, arguments = typing.get_origin(kind), typing.get_args(kind)
    if shape is types.UnionType:
        inner = next(option for option in arguments if option is not types.NoneType)
        return None if value is None else _decode(inner, value, origin, where)
    if shape is Literal:
        return _expect(value in arguments, value, f"one of {', '.join(map(repr, arguments))}", origin, where)
    if shape is tuple:
        _expect(isinstance(value, list), value, "a list", origin, where)
        return tuple(_decode(arguments[0], item, origin, f"{where}[{n}]") for n, item in enumerate(value))
    if shape is Mapping:
        _expect(isinstance(value, dict), value, "an object", origin, where)
        return {key: _decode(arguments[1], item, origin, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    accepted = (int, float) if kind is float else kind
    matches = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    return _expect(matches, value, f"a {kind.__name__}", origin, where)


def _decode_dataclass(kind: Any, value: Any, origin: str, where: str) -> Any:  # noqa: ANN401
    _expect(isinstance(value, dict), value, "an object", origin, where or "(the whole file)")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in value.keys() - fields.keys():
        _refuse(
            origin, prefix + name, "a field of this format", "an unknown field", "Remove it or update qingyu."
        )
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in value
    ]
    if missing:
        _refuse(origin, prefix + missing[0], "a value", "nothing", "Export the model again.")
    return kind(**{name: _decode(hints[name], item, origin, prefix + name) for name, item in value.items()})


def _expect(holds: bool, value: Any, expected: str, origin: str, where: str) -> Any:  # noqa: ANN401
    if not holds:
        shown = repr(value)
        _refuse(
            origin,
            where,
            expected,
            shown if len(shown) <= 80 else shown[:77] + "...",
            "Export the model again.",
        )
    return value


_LIMITS: Mapping[str, tuple[int, int]] = {
    # Far above any BERT that exists; below what would make an allocation or a loop absurd.
    "dim": (1, 1 << 16),
    "max_tokens": (3, 1 << 20),
    "architecture.layers": (1, 1000),
    "architecture.hidden_size": (1, 1 << 16),
    "architecture.heads": (1, 1 << 10),
    "architecture.intermediate_size": (1, 1 << 20),
    "architecture.vocab_size": (1, 1 << 24),
    "architecture.max_positions": (3, 1 << 20),
}


GOLDEN_TEXTS = 16
GOLDEN_CHARACTERS = 2000
LEAST_COSINES = (
    0.5,
    0.99999,
)  # below, a test of nothing; above, float16 and other CPUs' rounding would fail it
UNIT_TOLERANCE = 0.01

# The options that decide how the file is held in memory. No other: some name files to write.
EDGE_OPTIONS = (
    "session.use_memory_mapped_ort_model",
    "session.use_ort_model_bytes_for_initializers",
    "session.disable_prepacking",
)


def _check(spec: ModelSpec, origin: str) -> None:
    _check_sizes(spec, origin)
    _check_files(spec, origin)
    if spec.default_prompt is not None:
        _expect(
            spec.default_prompt in spec.prompts,
            spec.default_prompt,
            "a name in prompts",
            origin,
            "default_prompt",
        )
    if spec.golden is not None:
        _check_golden(spec.golden, spec.dim, origin)
    if spec.edge is not None:
        _check_edge(spec.edge, origin)
    if spec.openvino is not None:
        low, high = LEAST_COSINES
        least = spec.openvino.least_cosine
        _expect(
            low <= least <= high, least, f"a number from {low} to {high}", origin, "openvino.least_cosine"
        )


def _check_golden(golden: Golden, dim: int, origin: str) -> None:
    texts, vectors, least = golden.texts, golden.vectors, golden.least_cosine
    wanted = f"1 to {GOLDEN_TEXTS} texts"
    _expect(1 <= len(texts) <= GOLDEN_TEXTS, len(texts), wanted, origin, "golden.texts")
    _expect(len(vectors) == len(texts), len(vectors), f"{len(texts)} vectors", origin, "golden.vectors")
    low, high = LEAST_COSINES
    _expect(low <= least <= high, least, f"a number from {low} to {high}", origin, "golden.least_cosine")
    for n, text in enumerate(texts):
        sound = 0 < len(text) <= GOLDEN_CHARACTERS and not re.search("[\ud800-\udfff]", text)
        _expect(sound, text, f"1 to {GOLDEN_CHARACTERS} characters of Unicode", origin, f"golden.texts[{n}]")
    for n, vector in enumerate(vectors):
        wanted = f"base64 of {dim} float16 numbers, a unit vector"
        _expect(_is_unit_vector(vector, dim), vector, wanted, origin, f"golden.vectors[{n}]")


def _is_unit_vector(text: str, dim: int) -> bool:
    try:
        values = decode_vector(text, dim)
    except ValueError:
        return False
    if not all(map(math.isfinite, values)):
        return False
    return abs(math.fsum(x * x for x in values) - 1) <= UNIT_TOLERANCE


def _check_edge(edge: EdgeFile, origin: str) -> None:
    heads = edge.heads_at_once
    _expect(heads is None or heads >= 1, heads, "at least 1", origin, "edge.heads_at_once")
    for option, value in edge.session.items():
        allowed = f"among {', '.join(EDGE_OPTIONS)}"
        _expect(option in EDGE_OPTIONS, option, allowed, origin, "edge.session")
        _expect(value in ("0", "1"), value, '"0" or "1"', origin, f"edge.session.{option}")


def _check_sizes(spec: ModelSpec, origin: str) -> None:
    for where, (least, most) in _LIMITS.items():
        value = spec
        for part in where.split("."):
            value = getattr(value, part)
        assert isinstance(value, int)
        _expect(least <= value <= most, value, f"a number from {least} to {most}", origin, where)
    sizes = spec.architecture
    _expect(
        sizes.hidden_size % sizes.heads == 0,
        sizes.heads,
        f"a divisor of {sizes.hidden_size}",
        origin,
        "heads",
    )
    _expect(
        spec.max_tokens <= sizes.max_positions, spec.max_tokens, "at most max_positions", origin, "max_tokens"
    )
    eps = sizes.layer_norm_eps
    _check_labels(spec, origin)
    _expect(math.isfinite(eps) and 0 < eps < 1, eps, "between 0 and 1", origin, "architecture.layer_norm_eps")


# Tasks whose graph gives one number for each label; how many labels, ``None`` for any number.
LABELLED: Mapping[str, int | None] = {
    "classification": None,
    "tagging": None,
    "reranking": 1,
    "question-answering": 2,
}
MOST_LABELS = 1 << 16


def _check_labels(spec: ModelSpec, origin: str) -> None:
    if spec.task not in LABELLED:
        return
    least, most = (LABELLED[spec.task] or 1, LABELLED[spec.task] or MOST_LABELS)
    holds = least <= len(spec.labels) <= most
    _expect(holds, len(spec.labels), f"{least} to {most} labels for {spec.task}", origin, "labels")
    _expect(spec.dim == spec.architecture.hidden_size, spec.dim, "the hidden size", origin, "dim")


def _check_files(spec: ModelSpec, origin: str) -> None:
    for name, record in spec.files.items():
        # A manifest may come from anywhere: it must not be able to name a file outside its folder.
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
        _expect(plain, name, "a plain file name", origin, "files")
        _expect(record.bytes >= 0, record.bytes, "a size in bytes", origin, f"files.{name}.bytes")
        hexadecimal = re.fullmatch(r"[0-9a-f]{64}", record.sha256) is not None
        _expect(hexadecimal, record.sha256, "64 hexadecimal digits", origin, f"files.{name}.sha256")
    named = [spec.graph, "tokenizer.json", spec.fallback]
    named += [None if other is None else other.file for other in (spec.edge, spec.openvino)]
    for name in (name for name in named if name is not None):
        _expect(name in spec.files, sorted(spec.files), f"a record of {name}", origin, "files")
