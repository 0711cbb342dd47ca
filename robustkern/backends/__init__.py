"""Implementations of the four primitives of `robustkern._kernels`, one module each."""
