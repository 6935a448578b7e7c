"""Routes of the tinker protocol."""
