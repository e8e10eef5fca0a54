"""Every error that qingyu raises on purpose, one class per who must act.

    QingyuError
    ├── InputError             the caller: what was passed in this call
    │   ├── InvalidTextError       not a str, or not valid Unicode
    │   ├── TextTooLongError       longer than the model reads, with ``long_text="error"``
    │   ├── InvalidOptionError     an option out of its range
    │   ├── DataFileError          a text file that cannot be read as asked
    │   ├── DocumentError          a document without id or text, or one whose id is there already
    │   ├── VectorSpaceError       vectors, a model or an index that are not of one vector space
    │   └── MismatchError          two model folders that are not of one model
    ├── OperatorError          whoever runs the program: the machine, the installation, the paths
    │   ├── MissingExtraError      an optional dependency is not installed
    │   ├── ModelNotFoundError     no model folder where one was named
    │   ├── SourceError            a hub, mirror or folder cannot be reached, refuses, or has no such model
    │   ├── OfflineError           the network is needed, and offline work was asked for
    │   ├── MemoryBudgetError      a memory budget too small for the model
    │   ├── OutputError            a result cannot be written
    │   ├── StoreError             a store of vectors is absent, in use, or cannot be reached
    │   ├── ClusterError           a Ray cluster cannot be reached, is too small, or has failed
    │   ├── UnsafeFolderError      somebody else can write where models are kept
    │   ├── KernelError            this machine computes wrong vectors with this model
    │   ├── OverloadedError        more work waits than can be done in time
    │   ├── ThreadLimitError       the system gives the process no more threads
    │   ├── ListenError            an address that a server cannot listen at
    │   └── ClosedError            used after ``close()``
    ├── ModelError             whoever made the model folder or the checkpoint
    │   ├── ManifestError          qingyu.json is not a valid manifest
    │   ├── CorruptFileError       a file does not have the hash that the manifest, or its source, gives
    │   ├── BundleError            a bundle file is not one, or is damaged
    │   ├── GraphError             the graph cannot be run, or is not what the manifest says
    │   ├── TokenizerError         tokenizer.json cannot be used
    │   ├── CheckpointError        a checkpoint folder is incomplete or inconsistent
    │   └── UnsupportedModelError  a sound model of a kind that this version does not handle
    └── FidelityError          a quantized model is further from FP32 than was allowed

A message always says what was expected, what was found and what to do.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CheckpointError",
    "ClosedError",
    "ClusterError",
    "CorruptFileError",
    "DataFileError",
    "DocumentError",
    "FallbackWarning",
    "FidelityError",
    "GraphError",
    "InputError",
    "InvalidOptionError",
    "InvalidTextError",
    "KernelError",
    "ListenError",
    "ManifestError",
    "MemoryBudgetError",
    "MismatchError",
    "MissingExtraError",
    "ModelError",
    "ModelNotFoundError",
    "OfflineError",
    "OperatorError",
    "OutputError",
    "OverloadedError",
    "QingyuError",
    "SourceError",
    "StoreError",
    "TextTooLongError",
    "ThreadLimitError",
    "TokenizerError",
    "TruncationWarning",
    "UnknownTokenWarning",
    "UnsafeFolderError",
    "UnsupportedModelError",
    "VectorSpaceError",
]


class QingyuError(Exception):
    """Base of all errors below; ``str(error)`` is one line: problem, expected, found, remedy."""

    exit_code = 1

    def __init__(self, problem: str, *, expected: str, found: str, remedy: str) -> None:
        super().__init__(problem, expected, found, remedy)
        self.problem = problem
        self.expected = expected
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}: expected {self.expected}, found {self.found}. {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.expected, self.found, self.remedy)


def _rebuild(kind: type[QingyuError], problem: str, expected: str, found: str, remedy: str) -> QingyuError:
    return kind(problem, expected=expected, found=found, remedy=remedy)


class InputError(QingyuError):
    """The caller must change what was passed."""

    exit_code = 3


class InvalidTextError(InputError):
    """A text is not a ``str``, or holds a lone surrogate and so is not Unicode text."""


class TextTooLongError(InputError):
    """A text is longer than the model reads and ``long_text="error"`` was asked for."""


class InvalidOptionError(InputError):
    """An option is out of its range or contradicts the model."""


class DataFileError(InputError):
    """A file of texts is missing, not UTF-8, or lacks the named field."""


class DocumentError(InputError):
    """A document has no id or no text, or its id is there already, or is not there."""


class VectorSpaceError(InputError):
    """Vectors, a model or an index are not of one vector space: another model, precision, prompt or dimension."""


class MismatchError(InputError):
    """Two model folders or graphs that were to be compared are not of the same model."""


class OperatorError(QingyuError):
    """Whoever runs the program must change the machine, the installation or a path."""

    exit_code = 5


class MissingExtraError(OperatorError):
    """An optional dependency is not installed; the message holds the pip command."""


class ModelNotFoundError(OperatorError):
    """There is no model folder where one was named."""


class SourceError(OperatorError):
    """A source of models cannot be reached, refuses access, breaks off, or does not have what was asked for."""


class OfflineError(OperatorError):
    """Something is not in the cache, and offline work was asked for."""


class MemoryBudgetError(OperatorError):
    """A memory budget does not hold the model and one row of its longest text."""


class OutputError(OperatorError):
    """A result cannot be written; nothing was left half-written."""


class StoreError(OperatorError):
    """A store of vectors is not where it was named, is in use by another writer, or cannot be reached."""


class ClusterError(OperatorError):
    """A Ray cluster cannot be reached, is too small for the job, or has failed."""


class UnsafeFolderError(OperatorError):
    """Somebody else can write to the folder where models are kept, so nothing there is read or written."""


class KernelError(OperatorError):
    """A model's golden vectors do not come out on this machine, so none of its vectors can be trusted."""


class OverloadedError(OperatorError):
    """More work waits than can be done in the time allowed; later, the same call may succeed."""


class ThreadLimitError(OperatorError):
    """The system gives this process no more threads."""


class ListenError(OperatorError):
    """A server cannot listen at the address that was named."""


class ClosedError(OperatorError):
    """The object was used after ``close()``."""


class ModelError(QingyuError):
    """Whoever made the model folder or the checkpoint must repair it."""

    exit_code = 4


class ManifestError(ModelError):
    """``qingyu.json`` is not a valid manifest."""


class CorruptFileError(ModelError):
    """A file is missing, or does not have the hash that the manifest, or its source, gives."""


class BundleError(ModelError):
    """A bundle file is not of the form that ``qingyu bundle`` writes, or is damaged."""


class GraphError(ModelError):
    """The graph cannot be loaded or run, or is not what the manifest says."""


class TokenizerError(ModelError):
    """``tokenizer.json`` cannot be used."""


class CheckpointError(ModelError):
    """A checkpoint folder is incomplete, damaged or inconsistent."""


class UnsupportedModelError(ModelError):
    """A sound model of a kind that this version does not handle."""


class FidelityError(QingyuError):
    """A quantized model is further from its FP32 original than was allowed."""

    exit_code = 6


class UnknownTokenWarning(UserWarning):
    """More than a tenth of the tokens are unknown to the model's vocabulary."""


class FallbackWarning(UserWarning):
    """A model's graph gives wrong vectors on this machine, so its FP32 graph is used."""


class TruncationWarning(UserWarning):
    """Texts to train on are longer than what is trained on, so that their ends do not count."""
