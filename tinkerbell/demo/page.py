"""The report of a demo run as one self-contained HTML page."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tinkerbell.demo.bill import Answer
from tinkerbell.demo.track import Track
from tinkerbell.demo.verdict import Verdict

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff }
h2 { margin-top: 2.5rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .35rem .8rem .35rem 0;
       border-bottom: 1px solid #ddd; vertical-align: top } td.number { text-align: right;
       font-variant-numeric: tabular-nums } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
.no { color: #a00000; font-weight: 600 }
"""


def page(tracks: Sequence[Track], verdicts: Sequence[Verdict], answers: Sequence[Answer], svg: str, head: str) -> str:
    """The whole page. `svg` is trusted, every other text is escaped."""
    results = [
        (
            track.user,
            track.task,
            track.lora,
            len(track.points),
            track.tokens,
            verdict.text,
            "" if verdict.passed else "no",
        )
        for track, verdict in zip(tracks, verdicts, strict=True)
    ]
    samples = [
        (track.user, prompt, before, after)
        for track in tracks
        for (prompt, before), (_, after) in zip(track.before, track.after, strict=False)
    ]
    parts = [
        f"<h1>Four users, one model</h1><p>{escape(head)}</p>",
        svg,
        "<h2>Results</h2>",
        _table(("user", "task", "adapter", "steps", "tokens", "result"), (row[:-1] for row in results)),
        *(f'<p class="no">{escape(row[0])}: {escape(row[5])}</p>' for row in results if row[-1]),
        "<h2>Samples, greedy</h2>",
        _table(("user", "prompt", "before", "after"), samples),
        "<h2>The bill, from SQL</h2>",
        *(f"<pre>{escape(answer.sql)}</pre>{_table(answer.columns, answer.rows)}" for answer in answers),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Tinkerbell demo</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td class="number">{shown(value)}</td>'
    return f"<td>{escape(shown(value))}</td>"


def shown(value: Any) -> str:
    """One value for a person."""
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
