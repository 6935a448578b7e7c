"""Benchmarks anybody can run: how fast the log is, what the server adds, how fair it is."""
