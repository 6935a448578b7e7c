"""Curves of losses, as PNG or as a page that needs nothing else."""

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec

from tinkerbell.errors import InvalidRequest, MissingPackage
from tinkerbell.files import open_private, write_private

COLOURS = ("#0072B2", "#D55E00", "#009E73")
"""Told apart with any colour vision (Okabe & Ito 2008)."""
STYLES = ("-", "--", ":")
"""So that curves that lie on one another are all seen."""


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a plot."""

    label: str
    steps: list[int]
    losses: list[float]


def require(file: Path) -> None:
    """Raise now rather than after minutes: InvalidRequest for another kind of file, MissingPackage."""
    if file.suffix not in (".png", ".html"):
        raise InvalidRequest(f"{file}: a plot is a .png or a .html file")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as exc:
        raise MissingPackage('plots need matplotlib: pip install "tinkerbell-server[demo]"') from exc


def curve(label: str, points: Sequence[tuple[int, float | None]]) -> Curve:
    """The points that have a value."""
    known = [(step, loss) for step, loss in points if loss is not None]
    return Curve(label=label, steps=[step for step, _ in known], losses=[loss for _, loss in known])


def draw(file: Path, title: str, curves: Sequence[Curve]) -> None:
    """Write the plot; the suffix of `file` says which kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for line, colour, style in zip(curves, COLOURS, STYLES, strict=False):
        axes.plot(line.steps, line.losses, color=colour, linestyle=style, marker=".", label=line.label)
    axes.set_title(title, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if file.suffix == ".png":
        with open_private(file, "wb") as output:
            figure.savefig(output, format="png", dpi=144)
        return
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    write_private(
        file,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
        f'<body style="max-width:60rem;margin:2rem auto">{text[text.index("<svg") :]}</body></html>',
    )
