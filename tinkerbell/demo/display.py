"""What a person sees while the users train: a live table on a terminal, a line now and then elsewhere."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinkerbell.demo.track import Track

BARS = "▁▂▃▄▅▆▇█"
CURVE = 14
"""Characters of a curve."""
WIDE = 120
"""Columns of a terminal that shows everything."""
EVERY = 4
"""Steps between two lines of a user where there is no terminal."""


class Display:
    """Use as a context manager, and call `update` as often as you like."""

    def __init__(self, console: Console, tracks: Sequence[Track]) -> None:
        self._console = console
        self._tracks = tracks
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._told: dict[str, int] = {}

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def _table(self) -> Table:
        return table(self._tracks, self._console.width)

    def update(self) -> None:
        """Show how it stands."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        for track in self._tracks:
            steps, told = len(track.points), self._told.get(track.user, 0)
            if steps - told >= EVERY or (steps == track.num_steps and steps != told):
                self._told[track.user] = steps
                now = f"{track.measure} {track.points[-1].value:.3f}"
                self._console.print(Text(f"{track.user:<8} step {steps:>3}/{track.num_steps}  {now}"))


def table(tracks: Sequence[Track], width: int) -> Table:
    """One row for each user; a narrow terminal does without task and adapter."""
    wide = width >= WIDE
    grid = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("user", *(("task", "adapter") if wide else ())):
        grid.add_column(name, no_wrap=True)
    for name in ("step", "now", "tokens", "busy s", "share"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("curve", no_wrap=True, min_width=CURVE)
    total = sum(track.cost_us for track in tracks)
    for track in tracks:
        values = [point.value for point in track.points]
        now = f"{track.measure} {values[-1]:.3f}" if values else track.state
        grid.add_row(
            Text(track.user),
            *((Text(track.task), Text(track.lora)) if wide else ()),
            f"{len(values)}/{track.num_steps}",
            Text("failed", style="red") if track.state == "failed" else Text(now),
            f"{track.tokens:,}",
            f"{track.cost_us / 1e6:,.1f}",
            f"{track.cost_us / total:.0%}" if total else "",
            Text(curve(values)),
        )
    return grid


def curve(values: Sequence[float]) -> str:
    """The values as at most CURVE bars, from 0 to their largest; more than that many are averaged in groups."""
    groups = min(len(values), CURVE)
    cuts = [len(values) * n // groups for n in range(groups + 1)] if groups else []
    means = [fmean(values[start:stop]) for start, stop in pairwise(cuts)]
    top = max(means, default=0.0)
    last = len(BARS) - 1
    return "".join(BARS[round(mean / top * last) if mean > 0 else 0] for mean in means)
