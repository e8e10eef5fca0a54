"""The effective tokenizer.json of a checkpoint: what transformers and sentence-transformers make of it.

transformers lets tokenizer_config.json overrule the normalizer in tokenizer.json; sentence-transformers
lower-cases on top where sentence_bert_config.json says so. Both are worked into one file here, so that a
runtime needs nothing but that file. Checked against transformers 4.57 and 5.23.

One known difference: a normalizer that sentence-transformers >= 5 saved as a sequence with Lowercase is kept, as
transformers 4 keeps it; transformers 5.23 drops it when it loads a BertTokenizer, and with it the lower-casing
that the saved model had. Not here: tokenizing (``qingyu.runtime``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qingyu.errors import TokenizerError
from qingyu.models.export.files import Document, read_optional

__all__ = ["FrontEnd", "read_front_end"]

TOKENIZER_LIMIT = 256 << 20
UNLIMITED = 1 << 30  # transformers writes 1e30 where a tokenizer has no maximum

BERT_SPECIAL: Mapping[str, str] = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIAL: Mapping[str, str] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "ConvBertTokenizer")
DEFAULT_SPECIAL: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(BERT_CLASSES, BERT_SPECIAL),
    "RobertaTokenizer": ROBERTA_SPECIAL,
    "XLMRobertaTokenizer": ROBERTA_SPECIAL,
}
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SPECIAL_NAMES = ("bos_token", *BERT_SPECIAL, "eos_token")


@dataclass(frozen=True)
class FrontEnd:
    """``tokenizer`` is the text of the effective tokenizer.json, the file's own bytes where nothing changed.

    ``overrides_length``: the maximum comes from sentence-transformers' tokenizer arguments, above all else.
    """

    tokenizer: bytes
    lowercase: bool
    model_max_length: int
    overrides_length: bool


def read_front_end(folder: Path, config: Document, transformer: Document, default_class: str) -> FrontEnd:
    """The front end of a checkpoint folder.

    ``default_class`` is the tokenizer class of the model type, for checkpoints that name none. Raises
    ``TokenizerError`` where there is no tokenizer, or none that the tokenizers library accepts.
    """
    arguments = {**transformer.object("tokenizer_args"), **transformer.object("processor_kwargs")}
    settings = read_optional(folder / "tokenizer_config.json").updated(arguments)
    named = settings.fields.get("tokenizer_class") or config.fields.get("tokenizer_class") or default_class
    kind = str(named).removesuffix("Fast")
    special = _special_tokens(folder, settings, kind)
    original = _read(folder / "tokenizer.json")
    text = _from_vocabulary(folder, kind, special) if original is None else original
    tokenizer = _load(folder, text)  # before its parts are touched: what loads is well formed
    document = _parse(folder, text)
    changed = _apply_transformers(document, settings, kind)
    changed |= _apply_lowercase(document, lowercase=transformer.flag("do_lower_case", default=False))
    if changed:
        text = json.dumps(document, ensure_ascii=False)
        tokenizer = _load(folder, text)
    missing = _missing_tokens(document, special, settings)
    if missing:
        tokenizer.add_tokens(missing)
        text = tokenizer.to_str()
    _check_ids(folder, tokenizer, config)
    return FrontEnd(
        tokenizer=text.encode("utf-8"),
        lowercase=_lowercases(document.get("normalizer")),
        model_max_length=_maximum(settings, config, capped="model_max_length" not in arguments),
        overrides_length="model_max_length" in arguments,
    )


def _refuse(problem: str, expected: str, found: str) -> NoReturn:
    raise TokenizerError(
        problem,
        expected=expected,
        found=found,
        remedy="Download the tokenizer files again, or write them with transformers: "
        "AutoTokenizer.from_pretrained('IN').save_pretrained('IN').",
    )


def _read(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        if path.stat().st_size > TOKENIZER_LIMIT:
            _refuse(
                f"{path} is too large", f"at most {TOKENIZER_LIMIT} bytes", f"{path.stat().st_size} bytes"
            )
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"{path} cannot be read", "JSON in UTF-8", str(error))


def _parse(folder: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(f"{folder / 'tokenizer.json'} cannot be read", "JSON", str(error) or type(error).__name__)
    if not isinstance(document, dict):
        _refuse(f"{folder / 'tokenizer.json'} cannot be read", "a JSON object", type(document).__name__)
    return document


def _load(folder: Path, text: str) -> Any:  # noqa: ANN401 - tokenizers.Tokenizer, loaded lazily
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        # The library panics on hostile files with an exception that is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        _refuse(
            f"{folder / 'tokenizer.json'} cannot be used", "a tokenizer of the tokenizers library", str(error)
        )


def _special_tokens(folder: Path, settings: Document, kind: str) -> dict[str, Mapping[str, Any]]:
    """The named special tokens as the fields of ``tokenizers.AddedToken``, by name."""
    stated = {**read_optional(folder / "special_tokens_map.json").fields, **settings.fields}
    named = {**DEFAULT_SPECIAL.get(kind, {}), **{key: stated[key] for key in SPECIAL_NAMES if key in stated}}
    tokens: dict[str, Mapping[str, Any]] = {}
    extra = stated.get("additional_special_tokens") or []
    extra = extra if isinstance(extra, list) else []
    named.update({f"additional_{number}": token for number, token in enumerate(extra)})
    for key, value in named.items():
        if isinstance(value, str):
            tokens[key] = {"content": value}
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            tokens[key] = value
        elif value is not None:
            settings.refuse(key, "a token")
    return tokens


def _missing_tokens(
    document: Mapping[str, Any], special: Mapping[str, Mapping[str, Any]], settings: Document
) -> list[Any]:
    """The special tokens that tokenizer.json does not mark as such; transformers marks them when it loads."""
    from tokenizers import AddedToken

    present = {token.get("content") for token in document.get("added_tokens") or ()}
    wanted = list(special.values())
    wanted += [value for value in settings.object("added_tokens_decoder").values() if isinstance(value, dict)]
    missing: dict[str, Any] = {}
    for fields in wanted:
        content = fields.get("content")
        if isinstance(content, str) and content not in present and content not in missing:
            options = {flag: fields[flag] for flag in TOKEN_FLAGS if isinstance(fields.get(flag), bool)}
            missing[content] = AddedToken(content, **{"special": True, "normalized": False, **options})
    return list(missing.values())


def _from_vocabulary(folder: Path, kind: str, special: Mapping[str, Mapping[str, Any]]) -> str:
    """A BERT tokenizer from vocab.txt, as transformers builds it; its normalizer is put in later."""
    path = folder / "vocab.txt"
    if kind not in BERT_CLASSES or not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12])
        _refuse(f"{folder} holds no tokenizer", "tokenizer.json, or vocab.txt for BERT", found)
    text = (_read(path) or "").replace("\r\n", "\n").replace("\r", "\n")  # as Python's text files do
    vocabulary = {token: number for number, token in enumerate(text.removesuffix("\n").split("\n"))}
    return _bert_tokenizer(folder, vocabulary, {key: str(special[key]["content"]) for key in BERT_SPECIAL})


def _bert_tokenizer(folder: Path, vocabulary: Mapping[str, int], special: Mapping[str, str]) -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    absent = sorted({token for token in special.values() if token not in vocabulary})
    if absent:
        _refuse(f"{folder / 'vocab.txt'} lacks special tokens", ", ".join(absent), "none of them")
    tokenizer = Tokenizer(models.WordPiece(dict(vocabulary), unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    first, last = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    return str(tokenizer.to_str())


def _apply_transformers(document: dict[str, Any], settings: Document, kind: str) -> bool:
    """What transformers changes in a tokenizer.json when it loads it; whether anything did."""
    parts = ("normalizer", "pre_tokenizer", "truncation", "padding")
    before = copy.deepcopy([document.get(part) for part in parts])
    document["truncation"] = document["padding"] = None  # each call of transformers sets its own
    normalizer = document.get("normalizer")
    if kind in BERT_CLASSES and (normalizer is None or normalizer.get("type") == "BertNormalizer"):
        document["normalizer"] = {
            "clean_text": True,
            **(normalizer or {}),
            "type": "BertNormalizer",
            "handle_chinese_chars": settings.flag("tokenize_chinese_chars", default=True),
            "strip_accents": settings.optional_flag("strip_accents"),
            "lowercase": settings.flag("do_lower_case", default=True),
        }
    pre_tokenizer = document.get("pre_tokenizer")
    if pre_tokenizer is not None and pre_tokenizer.get("type") == "ByteLevel":
        pre_tokenizer["add_prefix_space"] = settings.flag("add_prefix_space", default=False)
    return before != [document.get(part) for part in parts]


def _apply_lowercase(document: dict[str, Any], *, lowercase: bool) -> bool:
    """What sentence-transformers does for do_lower_case: a Lowercase first, unless there is one already."""
    normalizer = document.get("normalizer")
    steps = _steps(normalizer)
    if not lowercase or any(step.get("type") == "Lowercase" for step in steps):
        return False
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *steps]}
    return True


def _steps(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, which is one step, a sequence of steps, or nothing."""
    if normalizer is None:
        return []
    if normalizer.get("type") == "Sequence":
        return list(normalizer["normalizers"])
    return [normalizer]


def _lowercases(normalizer: Mapping[str, Any] | None) -> bool:
    return any(
        step.get("type") == "Lowercase" or step.get("lowercase") is True for step in _steps(normalizer)
    )


def _check_ids(folder: Path, tokenizer: Any, config: Document) -> None:  # noqa: ANN401 - as in _load
    size = config.integer("vocab_size", 1, 1 << 24)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= size:
        _refuse(
            f"{folder}: tokenizer and config.json disagree", f"token ids below {size}", f"the id {highest}"
        )


def _maximum(settings: Document, config: Document, *, capped: bool) -> int:
    """model_max_length; sentence-transformers takes no more than max_position_embeddings unless told to."""
    value = settings.fields.get("model_max_length")
    if value is None:
        value = UNLIMITED
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 3:
        settings.refuse("model_max_length", "a number of at least 3")
    positions = config.integer("max_position_embeddings", 3, 1 << 20)
    return int(min(value, positions if capped else UNLIMITED))
