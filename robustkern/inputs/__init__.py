"""From the caller's updates to rows as pointers, and from the result back to the caller's kind."""
