"""`tinkerbell db compact`: old bulk leaves the log."""

import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinkerbell.cli.keys import TENANT
from tinkerbell.cli.options import cell, json_option, log_options, open_store, print_json, print_table, when
from tinkerbell.errors import NotFound

if TYPE_CHECKING:
    from tinkerbell.events.leases import Lease
    from tinkerbell.events.removal import Bulk
    from tinkerbell.events.store import EventStore

_SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


class Age(click.ParamType[int]):
    """A time span as microseconds: a number and a unit."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]{1,4})([hdw])", str(value))
        if match is None:
            self.fail(f"{value!r} is no age: a number and h, d or w, as in 30d", param, ctx)
        return int(match[1]) * _SECONDS[match[2]] * 1_000_000


@click.command()
@click.option("--older-than", "age_us", type=Age(), required=True, help="As in 12h, 30d or 8w.")
@click.option("--tenant", type=TENANT, help="Of this tenant only.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@log_options
@json_option
def compact(
    age_us: int,
    tenant: str | None,
    dry_run: bool,
    yes: bool,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Take old requests' data, old results and old recovery points out of the log.

    What is needed stays: saved checkpoints, requests without an answer, and all that living adapters are restored
    from after a crash. So does every event with its numbers and hashes: `tinkerbell audit verify` still holds. But a
    run that lost data cannot be verified, forked or exported any more, and its old results cannot be fetched: they are
    gone, for good. Every server on this log has to be stopped first, but not for --dry-run. If it is interrupted, run
    it again.

    \b
    tinkerbell db compact --older-than 30d --dry-run
    """
    from tinkerbell.cli.alone import alone
    from tinkerbell.scheduler.expendable import expendable

    before_us = time.time_ns() // 1000 - age_us
    num_files = None
    store = open_store(config, data_dir, database_url)
    try:
        tenants = store.queries.tenants()
        if tenant is not None and tenant not in tenants:
            raise NotFound(f"the log has nothing of a tenant {tenant}")
        tenants = tenants if tenant is None else [tenant]
        with nullcontext() if dry_run else alone(store, "tinkerbell db compact") as lease:
            plan = {name: list(expendable(store, name, before_us)) for name in tenants}
            bulk = {name: store.retention.bulk_at(positions) for name, positions in plan.items()}
            if not as_json:
                _show(bulk, before_us)
            if lease is not None:
                if not yes:
                    click.confirm("It cannot be undone. Go on?", abort=True, err=True)
                num_files = _compact(store, plan, before_us, lease)
    finally:
        store.close()
    if as_json:
        print_json({"before_us": before_us, "removed": not dry_run, "num_files": num_files, "tenants": bulk})
    elif num_files is not None:
        click.echo(f"Removed; {cell(num_files)} files deleted.")


def _compact(store: "EventStore", plan: dict[str, list[int]], before_us: int, lease: "Lease") -> int:
    from tinkerbell.cli.replay.options import progress

    fence = (lease.resource, lease.epoch)
    with progress("compact") as tell:
        for name, positions in plan.items():
            store.retention.compact(name, positions, before_us, actor=lease.holder, fence=fence, tell=tell)
        return store.retention.finish_compaction(tell)


def _show(bulk: dict[str, "Bulk"], before_us: int) -> None:
    from tinkerbell.events.removal import Bulk

    of = [*bulk.items(), ("total", sum(bulk.values(), Bulk()))]
    rows = [(name, each.num_bodies, each.num_blobs, each.num_bytes) for name, each in of]
    print_table(f"To be removed: older than {when(before_us)}", ("tenant", "bodies", "blobs", "bytes"), rows)
