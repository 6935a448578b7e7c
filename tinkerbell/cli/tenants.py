"""`tinkerbell tenants`: each tenant's share of the accelerator and its limits; erasing one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from tinkerbell.cli.keys import TENANT
from tinkerbell.cli.options import (
    MAX_INTEGER,
    json_option,
    log_options,
    open_store,
    print_json,
    print_table,
    settings_of,
)


class Count(click.ParamType[int | str]):
    """A number of things, or `default`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == DEFAULT else COUNT.convert(value, param, ctx)


DEFAULT = "default"
"""Gives a limit back to the server's settings."""
COUNT = click.IntRange(min=0, max=MAX_INTEGER)
LIMIT = Count()
LIMITS = {
    "pending_requests": "Requests that may wait",
    "pending_tokens": "Tokens that may wait, those to be sampled included",
    "adapters": "Living adapters",
    "adapter_bytes": "Bytes that living adapters take in the executor",
    "sessions": "Open sessions of the tinker protocol",
    "samplers": "Samplers of open sessions",
    "checkpoints": "Checkpoints that are kept",
    "stored_bytes": "Bytes that the log keeps, with bodies and blobs",
}
"""Everything that is limited, and what it is."""


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-... for each limit."""
    for name, help_ in reversed(LIMITS.items()):
        option = f"--max-{name.replace('_', '-')}"
        command = click.option(option, type=LIMIT, help=f"{help_}, or `default`: the server's setting.")(command)
    return command


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
@limit_options
@log_options
@json_option
def set_tenant(
    tenant: str,
    weight: float | None,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
    **limits: int | str | None,
) -> None:
    """Set TENANT's share and limits; what is not named stays as it is.

    \b
    tinkerbell tenants set alice --weight 2 --max-pending-requests 200
    tinkerbell tenants set alice --max-stored-bytes 10737418240
    tinkerbell tenants set alice --max-pending-requests default
    """
    from tinkerbell.events.kinds import NewEvent, TenantConfigured

    given = {"weight": weight, **limits}
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


@tenants.command()
@click.argument("tenant", type=TENANT)
@log_options
@json_option
def show(tenant: str, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Show what TENANT has of everything that is limited, and what it may have.

    Limits that it has none of its own for are those of the settings given here: name the server's with --config.

    \b
    tinkerbell tenants show alice
    """
    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    store = open_store(config, data_dir, database_url)
    try:
        row = store.queries.tenant(tenant)
        holding = store.queries.holding(tenant, settings.limits)
    finally:
        store.close()
    rows = [
        {
            "what": name,
            "used": getattr(holding.used, name),
            "limit": getattr(holding.limits, name),
            "own": getattr(row, f"max_{name}") is not None,
        }
        for name in LIMITS
    ]
    if as_json:
        print_json({"tenant": tenant, "weight": row.weight, "quotas": rows})
    else:
        columns = ("what", "used", "limit", "its own")
        print_table(f"{tenant}, weight {row.weight:g}", columns, [tuple(each.values()) for each in rows])


@tenants.command(name="list")
@log_options
@json_option
def list_tenants(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """List tenants with their shares and what they have of everything that is limited.

    \b
    tinkerbell tenants list --json
    """
    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    store = open_store(config, data_dir, database_url)
    try:
        found = [
            (store.queries.tenant(name), store.queries.holding(name, settings.limits))
            for name in store.queries.tenants()
        ]
    finally:
        store.close()
    if as_json:
        print_json([to_builtins(row) | {"used": holding.used} for row, holding in found])
        return
    columns = ("tenant", "weight", *(name.replace("_", " ") for name in LIMITS))
    rows = [
        (row.tenant, f"{row.weight:g}", *(f"{getattr(h.used, n):,} of {getattr(h.limits, n):,}" for n in LIMITS))
        for row, h in found
    ]
    print_table("Tenants", columns, rows)


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
    for each in done.left:
        click.echo(f"Not all is out of reach: {each}", err=True)
    if done.key_file is not None:
        click.echo(
            f"{done.key_file} has a new key, and {done.num_keys_rewrapped} data keys of others were wrapped with it:"
            " copy it to every machine that has one, and to your backup of it in place of the old one. Who still has"
            " the old key file and an old copy of the database can read what was erased."
        )
    bulk = done.bulk
    if done.position is None:
        click.echo(f"{tenant} had been erased already; nothing was left but {done.num_files} files.")
        return
    click.echo(
        f"{tenant} is erased (event {done.position}): {bulk.num_bodies} bodies and {bulk.num_blobs} blobs,"
        f" {bulk.num_bytes} bytes; {done.num_keys_destroyed} data keys destroyed, {done.num_keys_revoked} API keys"
        f" revoked, {done.num_adapters} adapters and {done.num_checkpoints} checkpoints gone."
    )
