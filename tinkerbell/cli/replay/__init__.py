"""`tinkerbell replay`: execute runs again from the log."""
