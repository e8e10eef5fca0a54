"""Where checkpoints come from: a Hugging Face endpoint, its mirror, ModelScope; each gives the same kind of list.

A source says which files a repository has at a revision, and what is known of them; ``download`` brings one file.
All bytes come through ``http``. Not here: where files are kept (``qingyu.models.cache``), and the folder as a
source, whose files are where they should be already.
"""

from __future__ import annotations

from qingyu.models.sources.http import Limits
from qingyu.models.sources.listing import RemoteFile, Snapshot, is_offline
from qingyu.models.sources.places import SOURCES, find_snapshot

__all__ = ["SOURCES", "Limits", "RemoteFile", "Snapshot", "find_snapshot", "is_offline"]
