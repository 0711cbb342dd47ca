"""Aggregation of update files, tensor by tensor."""

from __future__ import annotations

from robustkern.files.merge import FileError, aggregate_files, expand

__all__ = ["FileError", "aggregate_files", "expand"]
