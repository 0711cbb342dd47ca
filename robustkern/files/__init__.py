"""Aggregation of update files, tensor by tensor."""

from __future__ import annotations

from robustkern.files.formats import FileError
from robustkern.files.merge import aggregate_files
from robustkern.files.workers import expand

__all__ = ["FileError", "aggregate_files", "expand"]
