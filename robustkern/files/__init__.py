"""Aggregation of update files, piece by piece."""

from __future__ import annotations

from robustkern.files.formats import SUFFIXES, WRITTEN, FileError
from robustkern.files.merge import Weights, aggregate_files, aggregate_pool, memory_of, touched
from robustkern.files.output import check_target
from robustkern.files.workers import Pool, find_workers, named_weights, read_weights

__all__ = [
    "SUFFIXES",
    "WRITTEN",
    "FileError",
    "Pool",
    "Weights",
    "aggregate_files",
    "aggregate_pool",
    "check_target",
    "find_workers",
    "memory_of",
    "named_weights",
    "read_weights",
    "touched",
]
