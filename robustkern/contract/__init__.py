"""The contract: rows as pointers, and the primitives that every backend implements alike."""
