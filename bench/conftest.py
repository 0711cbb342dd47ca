"""What the benchmarks share."""

from robustkern.measure.fixtures import read_pass

__all__ = ["read_pass"]
