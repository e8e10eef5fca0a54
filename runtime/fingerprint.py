"""A short name for a vector space, to be kept beside vectors and compared before they are mixed.

Where two fingerprints are equal, the same text is given the same vector (but for rounding), by whatever path
the model was opened: they are made of what the files hold, and not of names, places or versions.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from qingyu.runtime.scripts import Script
from qingyu.runtime.spec import ModelSpec

__all__ = ["fingerprint"]

FORMAT = 1  # a change of what is hashed, or how, is a new number and so a new prefix
DIGITS = 32  # hexadecimal; 128 bits


def fingerprint(
    spec: ModelSpec,
    *,
    prompt: str | None = None,
    dim: int | None = None,
    normalize: bool | None = None,
    special_tokens: Literal["parse", "text"] = "parse",
    unicode_form: Literal["NFKC"] | None = None,
    script: Script | None = None,
) -> str:
    """The fingerprint of the vectors that ``Embedder.embed`` gives with these options, ``qy1-`` and 32 hex digits.

    Options mean what they mean there and in ``Embedder.open``: a prompt's name and its text give the same
    fingerprint, and so do ``None`` and the model's own default. Hashed are the SHA-256 of the graph and of
    tokenizer.json, precision, pooling, maximum tokens, the prompt's text, dimensions and normalization, as JSON with
    sorted keys. Profile, threads, memory budget and the edge file do not count: they change no vector beyond
    rounding. Nor does ``long_text``, whose vectors of longer texts lie in the same space.

    It is stable: a version of qingyu that gave another one for the same model and options would use another prefix.

    Raises ``InvalidOptionError`` as ``embed`` does.
    """
    facts = {
        "dim": spec.width(dim),
        "graph": spec.files[spec.graph].sha256,
        "max_tokens": spec.max_tokens,
        "normalize": spec.normalize if normalize is None else normalize,
        "pooling": spec.pooling,
        "precision": spec.precision,
        "prompt": spec.prompt_text(prompt),
        "special_tokens": special_tokens,
        "tokenizer": spec.files["tokenizer.json"].sha256,
        "unicode_form": unicode_form,
    }
    if script is not None:  # younger than the format: without it the names stay what they were
        facts["script"] = script
    # Escaped, so that a prompt that is no valid Unicode has a fingerprint, too: refusing it is the tokenizer's part.
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f"qy{FORMAT}-{hashlib.sha256(text.encode('ascii')).hexdigest()[:DIGITS]}"
