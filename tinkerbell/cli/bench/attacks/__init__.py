"""What one tenant, or somebody without a key, may try against a server: one function each."""
