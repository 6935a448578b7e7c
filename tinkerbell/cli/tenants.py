"""`tinkerbell tenants`: each tenant's share of the accelerator and its limits; erasing one."""

import math
from pathlib import Path
from typing import Any

import click

from tinkerbell.cli.keys import TENANT
from tinkerbell.cli.options import MAX_INTEGER, json_option, log_options, open_store, print_json, print_table


class Count(click.ParamType[int | str]):
    """A number of things, or `default`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == DEFAULT else COUNT.convert(value, param, ctx)


DEFAULT = "default"
"""Gives a limit back to the server's settings."""
COUNT = click.IntRange(min=0, max=MAX_INTEGER)
LIMIT = Count()


@click.group()
def tenants() -> None:
    """Shares and limits of tenants; erasing one.

    \b
    tinkerbell tenants set alice --weight 2
    tinkerbell tenants list
    """


@tenants.command(name="set")
@click.argument("tenant", type=TENANT)
@click.option(
    "--weight",
    type=click.FloatRange(min=0.001, max=1000),
    help="Share of the accelerator, relative to others' 1.",
)
@click.option("--max-pending-requests", type=LIMIT, help="Requests that may wait, or `default`: the server's setting.")
@click.option("--max-pending-tokens", type=LIMIT, help="Tokens that may wait, or `default`.")
@click.option("--max-adapters", type=LIMIT, help="Living adapters, or `default`.")
@log_options
@json_option
def set_tenant(
    tenant: str,
    weight: float | None,
    max_pending_requests: int | str | None,
    max_pending_tokens: int | str | None,
    max_adapters: int | str | None,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Set TENANT's share and limits; what is not named stays as it is.

    \b
    tinkerbell tenants set alice --weight 2 --max-pending-requests 200
    tinkerbell tenants set alice --max-pending-requests default
    """
    from tinkerbell.events.kinds import NewEvent, TenantConfigured

    given = {
        "weight": weight,
        "max_pending_requests": max_pending_requests,
        "max_pending_tokens": max_pending_tokens,
        "max_adapters": max_adapters,
    }
    if weight is not None and not math.isfinite(weight):
        raise click.UsageError("A weight is a finite number.")
    changes = {name: None if value == DEFAULT else value for name, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("Nothing to set; see --help.")
    store = open_store(config, data_dir, database_url)
    try:
        row = store.queries.tenant(tenant)
        event = TenantConfigured(**{name: changes.get(name, getattr(row, name)) for name in given})
        store.append(NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}"))
    finally:
        store.close()
    values = {name: getattr(event, name) for name in given}
    if as_json:
        print_json({"tenant": tenant, **values})
    else:
        shown = {name: DEFAULT if value is None else value for name, value in values.items()}
        click.echo(f"{tenant}: " + ", ".join(f"{name} = {value}" for name, value in shown.items()))


@tenants.command(name="list")
@log_options
@json_option
def list_tenants(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """List tenants with their shares, limits and what waits.

    \b
    tinkerbell tenants list --json
    """
    store = open_store(config, data_dir, database_url)
    try:
        rows = []
        for name in store.queries.tenants():
            row = store.queries.tenant(name)
            requests, tokens = store.queries.pending_count(name)
            rows.append(
                {
                    "tenant": name,
                    "weight": row.weight,
                    "max_pending_requests": row.max_pending_requests,
                    "max_pending_tokens": row.max_pending_tokens,
                    "max_adapters": row.max_adapters,
                    "num_pending": requests,
                    "pending_tokens": tokens,
                }
            )
    finally:
        store.close()
    if as_json:
        print_json(rows)
    else:
        columns = (
            "tenant",
            "weight",
            "max requests",
            "max tokens",
            "max adapters",
            "pending",
            "pending tokens",
        )
        print_table("Tenants (empty: the server's default)", columns, [tuple(row.values()) for row in rows])


@tenants.command()
@click.argument("tenant", type=TENANT)
@click.option("--yes", is_flag=True, help="Do not ask.")
@log_options
@json_option
def erase(
    tenant: str, yes: bool, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool
) -> None:
    """Make everything TENANT has stored unreadable, for good, and take it out.

    Prompts, data, results and weights go: their keys are destroyed, their bytes deleted and the database is written
    anew. The API keys are revoked, the adapters removed. Events stay, with numbers and names but without data, and so
    does the proof that nothing else was touched: `tinkerbell audit verify` still holds. Backups, exported runs and
    downloads are out of reach; see docs/how-to/retention.md. Every server on this log has to be stopped first. If it
    is interrupted, run it again.

    \b
    tinkerbell tenants erase alice
    """
    from tinkerbell.cli.alone import alone
    from tinkerbell.cli.replay.options import progress

    store = open_store(config, data_dir, database_url)
    try:
        plan = store.retention.plan(tenant)
        if not yes:
            click.confirm(
                f"Erase {tenant}: {plan.num_bodies} bodies, {plan.num_blobs} blobs, {plan.num_bytes} bytes,"
                f" {len(plan.adapters)} adapters, {len(plan.checkpoints)} checkpoints. It cannot be undone. Go on?",
                abort=True,
                err=True,
            )
        with alone(store, "tinkerbell tenants erase") as lease, progress(f"erase {tenant}") as tell:
            fence = (lease.resource, lease.epoch)
            done = store.retention.erase(tenant, actor=lease.holder, fence=fence, tell=tell)
    finally:
        store.close()
    if as_json:
        print_json(done)
        return
    bulk = done.bulk
    if done.position is None:
        click.echo(f"{tenant} had been erased already; nothing was left but {done.num_files} files.")
        return
    click.echo(
        f"{tenant} is erased (event {done.position}): {bulk.num_bodies} bodies and {bulk.num_blobs} blobs,"
        f" {bulk.num_bytes} bytes; {done.num_keys_destroyed} data keys destroyed, {done.num_keys_revoked} API keys"
        f" revoked, {done.num_adapters} adapters and {done.num_checkpoints} checkpoints gone."
    )
