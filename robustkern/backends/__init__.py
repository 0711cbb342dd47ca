"""Implementations of the four primitives of `robustkern.contract.primitives`, one module each."""
