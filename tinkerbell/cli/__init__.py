"""The `tinkerbell` command: every part of the product, put together for a person or a script."""
