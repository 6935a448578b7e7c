"""`tinkerbell usage`: the bill, from the log."""

from pathlib import Path

import click

from tinkerbell.cli.keys import TENANT
from tinkerbell.cli.options import json_option, log_options, open_store, print_json, print_table

COLUMNS = ("tenant", "adapter", "kind", "num_requests", "tokens_in", "tokens_out", "cost_us")


@click.command()
@click.option("--tenant", type=TENANT, help="Of this tenant only.")
@log_options
@json_option
def usage(
    tenant: str | None, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool
) -> None:
    """Print what every tenant's adapters used: requests, tokens, accelerator time.

    \b
    tinkerbell usage --tenant alice
    tinkerbell usage --json
    """
    store = open_store(config, data_dir, database_url)
    try:
        rows = store.queries.usage(tenant)
    finally:
        store.close()
    if as_json:
        print_json([{name: getattr(row, name) for name in COLUMNS} for row in rows])
        return
    lines = [
        (r.tenant, r.adapter, r.kind, r.num_requests, r.tokens_in, r.tokens_out, f"{r.cost_us / 1e6:,.3f}")
        for r in rows
    ]
    total = (
        "total",
        "",
        "",
        sum(r.num_requests for r in rows),
        sum(r.tokens_in for r in rows),
        sum(r.tokens_out for r in rows),
        f"{sum(r.cost_us for r in rows) / 1e6:,.3f}",
    )
    print_table(
        "Usage",
        ("tenant", "adapter", "kind", "requests", "tokens in", "tokens out", "accelerator s"),
        [*lines, total],
    )
