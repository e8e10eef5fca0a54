"""What a source says of a repository: a revision, and files with what is known of each.

Names come from a server that is not trusted: only plain paths of the kinds of files that a checkpoint consists of are
taken, and the rest of a repository (pickles, other frameworks' weights, code) is left where it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qingyu.errors import SourceError, UnsupportedModelError
from qingyu.models.sources.http import Request

__all__ = ["RemoteFile", "Snapshot", "check_repository", "choose", "is_offline", "is_set"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What qingyu.models.export reads, beside the weights.
WANTED = (
    "README.md",
    "added_tokens.json",
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_xlm-roberta_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PATH = re.compile(r"(?:\d{1,2}_[A-Za-z0-9_]+/)?[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
MOST_FILES = 200


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; ``None`` is what the source does not say.

    ``git_sha1`` is git's own hash of a file that is not in large-file storage.
    """

    path: str
    bytes: int | None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one revision, and where each can be had.

    ``revision`` names the content: a commit, or a digest of the list where the source tells no commit.
    """

    source: str
    repository: str
    asked: str
    revision: str
    files: tuple[RemoteFile, ...]
    requests: Mapping[str, Request]

    @property
    def bytes(self) -> int:
        """What all files take, those of unknown size left out."""
        return sum(file.bytes or 0 for file in self.files)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network."""
    return is_set("HF_HUB_OFFLINE") or is_set("TRANSFORMERS_OFFLINE")


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes, in the words that huggingface_hub takes for it."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def check_repository(repository: str, revision: str | None) -> None:
    """Raise ``SourceError`` for names that no repository or revision can have, before they get into an address."""
    sound = REPOSITORY.fullmatch(repository) is not None and ".." not in repository
    sound_revision = revision is None or (REVISION.fullmatch(revision) is not None and ".." not in revision)
    if not sound or not sound_revision:
        raise SourceError(
            "the name of a model",
            expected="OWNER/NAME, and a branch, tag or commit as --revision",
            found=repr(repository) if not sound else repr(revision),
            remedy="Copy the name from the model's page.",
        )


def choose(files: Iterable[RemoteFile], origin: str) -> tuple[RemoteFile, ...]:
    """The files of a checkpoint among those of a repository, by path.

    Raises ``SourceError`` for a list that cannot be, ``UnsupportedModelError`` where there are no safetensors.
    """
    listed = list(files)
    present = {file.path for file in listed}
    chosen = sorted((file for file in listed if _is_wanted(file.path, present)), key=lambda file: file.path)
    names = [file.path.casefold() for file in chosen]
    if len(set(names)) != len(names) or len(names) > MOST_FILES:
        raise SourceError(
            f"{origin}: list of files",
            expected=f"at most {MOST_FILES} different files",
            found=f"{len(names)}, some twice",
            remedy="Try another source with --from.",
        )
    if not any(file.path.endswith(".safetensors") and not _folder(file.path) for file in chosen):
        pickles = sorted(path for path in present if path.endswith((".bin", ".pt", ".ckpt")))
        raise UnsupportedModelError(
            f"{origin} has no safetensors weights",
            expected=f"{WEIGHTS}, or {INDEX} and its shards",
            found=", ".join(pickles[:4]) or "no weights",
            remedy="Convert the model where torch is at hand and trusted, and pull that folder.",
        )
    return tuple(chosen)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _is_wanted(path: str, present: set[str]) -> bool:
    if PATH.fullmatch(path) is None:
        return False
    folder, _, name = path.rpartition("/")
    beside = f"{folder}/{WEIGHTS}" if folder else WEIGHTS
    if name == INDEX or SHARD.fullmatch(name):
        return beside not in present
    return name == WEIGHTS or name in WANTED
