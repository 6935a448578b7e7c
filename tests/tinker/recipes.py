"""Recipes of tinker-cookbook as programs, and the numbers they write."""

import json
from pathlib import Path


def arguments(name: str, **settings: object) -> list[str]:
    """To run one of them."""
    return ["-m", f"tinker_cookbook.recipes.{name}", *(f"{key}={value}" for key, value in settings.items())]


def metric(log: Path, name: str) -> list[float]:
    """What the recipe wrote of it, step by step."""
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]
