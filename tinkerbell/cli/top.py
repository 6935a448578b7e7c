"""`tinkerbell top`: who waits, who is served, live."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import click
import msgspec
from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tinkerbell import wire
from tinkerbell.cli.options import json_option

RECENT_S = 60.0
"""What the server means by recent."""
BAR_WIDTH = 24


@click.command()
@click.option("--url", help="Of the server.  [default: TINKERBELL_URL, or http://127.0.0.1:8080]")
@click.option("--api-key", help="One made with --admin, unless --mine is given.  [default: TINKERBELL_API_KEY]")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds.",
)
@click.option("--mine", is_flag=True, help="Your own line only; any key will do.")
@click.option("--once", is_flag=True, help="Print one look and end.")
@json_option
def top(url: str | None, api_key: str | None, interval_s: float, mine: bool, once: bool, as_json: bool) -> None:
    """Watch the queue, the shares and the throughput of every tenant; Ctrl-C ends it.

    \b
    tinkerbell top
    tinkerbell top --mine
    tinkerbell top --once --json

    With --json one object a line.
    """
    from tinkerbell.sdk.client import Client
    from tinkerbell.sdk.retry import RetryPolicy

    with Client(url, api_key, retry=RetryPolicy(give_up_after_s=2.0)) as client:
        look = partial(client.queue, all_tenants=not mine)
        if as_json:
            for queue in looks(look, interval_s, once):
                click.echo(msgspec.json.encode(queue))
            return
        console = Console()
        if once:
            console.print(screen(look()))
            return
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            for queue in looks(look, interval_s, once):
                live.update(screen(queue), refresh=True)


def looks(look: Callable[[], wire.Queue], interval_s: float, once: bool) -> Iterator[wire.Queue]:
    """One look, or one every `interval_s` until Ctrl-C."""
    try:
        yield look()
        while not once:
            time.sleep(interval_s)
            yield look()
    except KeyboardInterrupt:
        return


def screen(queue: wire.Queue) -> Group:
    """What a person sees of one look."""
    recent_us = sum(row.recent_cost_us for row in queue.tenants)
    table = Table(header_style="bold", expand=False)
    table.add_column("tenant")
    for name in ("weight", "pending", "pending tokens", "tokens/s", "busy", "accelerator s"):
        table.add_column(name, justify="right")
    table.add_column("share of the last minute", min_width=BAR_WIDTH)
    for row in sorted(queue.tenants, key=lambda row: (-row.recent_cost_us, row.tenant)):
        table.add_row(
            Text(row.tenant),
            f"{row.weight:g}",
            f"{row.num_pending:,}",
            f"{row.pending_tokens:,}",
            f"{row.recent_tokens / RECENT_S:,.0f}",
            f"{row.recent_cost_us / RECENT_S / 1e4:.1f} %",
            f"{row.cost_us / 1e6:,.1f}",
            Bar(max(recent_us, 1), 0, row.recent_cost_us, width=BAR_WIDTH, color="cyan"),
        )
    pending = sum(row.num_pending for row in queue.tenants)
    busy = recent_us / RECENT_S / 1e4
    head = f"log position {queue.position:,}   pending {pending:,}   accelerator busy {busy:.1f} %"
    return Group(Text(f"tinkerbell top   {head}", style="bold"), table)
