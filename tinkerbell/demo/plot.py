"""The curves of a demo run, as PNG and as SVG."""

import io
from collections.abc import Sequence
from typing import Any

from tinkerbell.demo.track import Track
from tinkerbell.errors import MissingPackage

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Told apart with any colour vision (Okabe & Ito 2008)."""


def require_matplotlib() -> None:
    """Raise MissingPackage now rather than after minutes of training."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as exc:
        raise MissingPackage('the plots need matplotlib: pip install "tinkerbell-server[demo]"') from exc


def draw(tracks: Sequence[Track]) -> tuple[bytes, str]:
    """PNG bytes and SVG text: losses on the left, rewards on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, rewards = figure.subplots(1, 2)
    colour = dict(zip((track.user for track in tracks), COLOURS, strict=False))
    for axes, measure, title, label in (
        (losses, "loss", "Supervised users", "loss per learned token (nats)"),
        (rewards, "reward", "Reinforcement learning", "mean reward of 16 samples"),
    ):
        for track in tracks:
            if track.measure == measure and track.points:
                _line(axes, track, colour[track.user])
        axes.set_title(title, loc="left")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    rewards.set_ylim(0, 1.05)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=144)
    # A fixed salt and no date: the same run gives the same file.
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return png.getvalue(), text[text.index("<svg") :]


def _line(axes: Any, track: Track, colour: str) -> None:
    steps = range(1, len(track.points) + 1)
    values = [point.value for point in track.points]
    axes.plot(steps, values, color=colour, marker=".", label=f"{track.user}: {track.task} ({track.lora})")
