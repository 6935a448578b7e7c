"""The picture of `tinkerbell bench train`: tokens per CPU second against tenants, one panel for each length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tinkerbell.demo.plot import COLOURS, require_matplotlib
from tinkerbell.files import open_private

SUFFIXES = (".png", ".svg", ".pdf")
LIMIT_COLOUR = "#000000"
MORE_COLOURS = (*COLOURS, "#56B4E9", "#E69F00")


def require(file: Path) -> None:
    """Say now, rather than after minutes, that it could not be drawn. Raises MissingPackage or a usage error."""
    if file.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"--plot: {file.name} does not end in {', '.join(SUFFIXES)}")
    require_matplotlib()


def draw(rows: Sequence[dict[str, Any]], limit: str, file: Path, title: str) -> None:
    """`rows` of the report, `limit` the variant that is none; the format is the file's suffix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    lengths = list(dict.fromkeys(row["length"] for row in rows))
    variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != limit]
    figure = Figure(figsize=(1.5 + 4.5 * len(lengths), 4.5), layout="constrained")
    for panel, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for number, variant in enumerate([*variants, limit]):
            points = [row for row in rows if row["length"] == length and row["variant"] == variant]
            colour = LIMIT_COLOUR if variant == limit else MORE_COLOURS[number % len(MORE_COLOURS)]
            panel.plot(
                [row["tenants"] for row in points],
                [row["tokens_per_cpu_s"] for row in points],
                color=colour,
                linestyle="--" if variant == limit else "-",
                marker="" if variant == limit and len(points) > 1 else "o",
                label=variant,
            )
        ticks = sorted({row["tenants"] for row in rows if row["length"] == length})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(length, loc="left")
        panel.set_xlabel("tenants in one pass")
        panel.set_ylabel("tokens per CPU second, forward and backward")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    metadata = {"Date": None} if file.suffix.lower() == ".svg" else None
    with open_private(file, "wb") as output:
        figure.savefig(output, format=file.suffix.lower().removeprefix(".") or "png", dpi=144, metadata=metadata)
