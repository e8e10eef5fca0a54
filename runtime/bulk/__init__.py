"""Files of texts to Parquet files of vectors, on one machine or on many, with Ray Data.

Needs the extra ``ray`` (ray, pyarrow), which is asked for when a job is started. Importing this loads neither.
"""

from __future__ import annotations

from qingyu.runtime.bulk.job import BulkOptions, Done, bulk_embed

__all__ = ["BulkOptions", "Done", "bulk_embed"]
