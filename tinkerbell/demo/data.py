"""The small data sets of the demo, written for it."""

from importlib import resources

import msgspec


def rows(name: str) -> list[dict[str, str]]:
    """The rows of `data/<name>.jsonl`."""
    lines = resources.files("tinkerbell.demo").joinpath(f"data/{name}.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=dict[str, str]) for line in lines]
