"""`tinkerbell replay runs`: what there is to replay."""

from pathlib import Path

import click

from tinkerbell.cli.keys import TENANT
from tinkerbell.cli.options import json_option, log_options, open_store, print_json, print_table, when

COLUMNS = ("id", "tenant", "name", "state", "step", "done_seq", "last_loss", "created_us")


@click.command()
@click.option("--tenant", type=TENANT, help="Of this tenant only.")
@log_options
@json_option
def runs(
    tenant: str | None, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool
) -> None:
    """List the runs of a log, oldest first: a run is an adapter, whatever became of it.

    \b
    tinkerbell replay runs --tenant alice
    """
    store = open_store(config, data_dir, database_url)
    try:
        rows = store.queries.adapters(tenant)
    finally:
        store.close()
    if as_json:
        print_json([{name: getattr(row, name) for name in COLUMNS} for row in rows])
        return
    print_table(
        "Runs",
        ("run", "tenant", "name", "adapter", "steps", "answered up to seq", "last loss", "since"),
        [(r.id, r.tenant, r.name, r.state, r.step, r.done_seq, r.last_loss, when(r.created_us)) for r in rows],
    )
