"""`tinkerbell audit`: verify and seal the log, and read what happened to one adapter."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from tinkerbell.cli.options import MAX_INTEGER, json_option, log_options, open_store, print_json, print_table, when
from tinkerbell.errors import Corrupt, NotFound

if TYPE_CHECKING:
    from tinkerbell.events.check_seals import KeptSeal

PAGE = 1000
SUMMARY_CHARS = 100
MOST_NAMED = 100
"""Of what cannot be read; --json names all."""


class Seal(click.ParamType["KeptSeal"]):
    """A root, and what it covers."""

    name = "ROOT[@POSITION]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "KeptSeal":
        from tinkerbell.events.check_seals import KeptSeal

        found = re.fullmatch(r"([0-9a-fA-F]{64})(?:@([0-9]{1,18}))?", value)
        if found is None:
            self.fail(f"{value!r} is no root as `tinkerbell audit seal` prints it: 64 hex digits, @ and a position")
        return KeptSeal(found[1].lower(), int(found[2]) if found[2] else None)


@click.group()
def audit() -> None:
    """Verify the log, seal it and read it, and count what is stored.

    \b
    tinkerbell audit verify
    tinkerbell audit seal
    tinkerbell audit storage
    tinkerbell audit events ad_5h3k
    """


@audit.command()
@click.option("--seal", "kept", type=Seal(), help="A seal that was kept elsewhere: the log must still have this root.")
@click.option("--without-keys", is_flag=True, help="Leave out what needs the key file, for who does not have it.")
@log_options
@json_option
def verify(
    kept: "KeptSeal | None",
    without_keys: bool,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Check every event, hash chain, seal, blob, projection, data key, and the schema. Exit status 1 names the first
    thing that is wrong.

    What is as it was written, and yet cannot be read by this release, is named with its position; the rest of the log
    is checked all the same, and the exit status says nothing of it.

    Every event must have been written by who has the key file: one that somebody put into the database has no MAC. The
    log of an older release begins to be authenticated at its upgrade; the line `authenticated_from` says where.

    Who has the database and the key file could still write a whole stream anew, with its hashes and the seals in the
    log. A seal that was printed or sent elsewhere before shows it: give it with --seal.

    \b
    tinkerbell audit verify --json
    tinkerbell audit verify --seal "$(cat monday.seal)"
    """
    verify_log(config, data_dir, database_url, as_json, kept, with_keys=not without_keys)


@audit.command()
@log_options
@json_option
def seal(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Seal the log and print ROOT@POSITION, to be kept where nobody who can write the database can.

    The server does so once a day (`seal_every_hours`) and writes the root to its own log. When nothing has happened
    since the last seal that one is printed again.

    \b
    tinkerbell audit seal > monday.seal
    """
    store = open_store(config, data_dir, database_url)
    try:
        sealed = store.seal(actor="tinkerbell audit seal") or store.newest_seal()
    finally:
        store.close()
    if sealed is None:
        raise NotFound("The log is empty: there is nothing to seal.")
    if as_json:
        print_json({"root": sealed.root, "position": sealed.position, "num_streams": sealed.num_streams})
    else:
        click.echo(f"{sealed.root}@{sealed.position}")


@audit.command()
@log_options
@json_option
def storage(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Count what the blob store has against what the log names, and whose it is. Exit status 1 where bytes are missing.

    Servers may run meanwhile. Orphans are files that no event needs: of requests under way, or left by a process that
    died; the leader removes them after `orphan_grace_s`.

    \b
    tinkerbell audit storage --json
    """
    store = open_store(config, data_dir, database_url)
    try:
        report = store.storage()
    finally:
        store.close()
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        counted = {name: getattr(report, name) for name in ("needed", "there", "orphans", "halves", "missing")}
        rows = [(name, each.number, each.num_bytes) for name, each in counted.items()]
        print_table("Blob store", ("blobs", "number", "bytes"), rows)
        of = [
            (tenant, what, each.number, each.num_bytes)
            for tenant, kinds in report.tenants.items()
            for what, each in sorted(kinds.items())
        ]
        print_table("Needed, by tenant", ("tenant", "what", "number", "bytes"), of)
        for digest in report.missing_digests:
            click.echo(f"missing: {digest}", err=True)
    if report.missing.number:
        raise SystemExit(1)


def verify_log(
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
    kept: "KeptSeal | None" = None,
    *,
    with_keys: bool = True,
) -> None:
    """Run the store's own audit and print its counts; a broken log is exit status 1."""
    store = open_store(config, data_dir, database_url)
    try:
        found = store.audit(seal=kept, with_keys=with_keys)
    except Corrupt as exc:
        if as_json:
            print_json({"ok": False, "problem": exc.detail})
            raise SystemExit(1) from exc
        raise
    finally:
        store.close()
    counts = msgspec.to_builtins(found)
    counts = {**counts.pop("log"), **counts}
    if as_json:
        print_json({"ok": True, **counts})
        return
    unreadable = counts.pop("unreadable")
    since = found.authenticated_from
    counts["authenticated_from"] = str(since) if since else "none" if with_keys else "not checked"
    counts["num_keys"] = "not checked" if found.num_keys is None else found.num_keys
    print_table("The log is whole", ("checked", "count"), list(counts.items()))
    if unreadable:
        rows = [tuple(each[name] for name in ("position", "type", "what", "why")) for each in unreadable[:MOST_NAMED]]
        title = f"Cannot be read by this release, and is as it was written: {len(unreadable)}"
        print_table(title, ("position", "type", "what", "why"), rows)


@audit.command()
@click.argument("adapter_id")
@click.option(
    "--after", type=click.IntRange(min=0, max=MAX_INTEGER), default=0, help="Only events after this position."
)
@log_options
@json_option
def events(
    adapter_id: str,
    after: int,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Print every event of ADAPTER_ID, oldest first; with --json one object a line.

    \b
    tinkerbell audit events ad_5h3k --json | head
    """
    from tinkerbell.events.kinds import facts_of, type_of

    store = open_store(config, data_dir, database_url)
    try:
        rows: list[tuple[object, ...]] = []
        found = False
        position = after
        while page := store.read(position, limit=PAGE, adapter=adapter_id):
            position, found = page[-1].position, True
            for recorded in page:
                data, kind = facts_of(recorded.event), type_of(recorded.event)
                if as_json:
                    line = {
                        "position": recorded.position,
                        "at_us": recorded.at_us,
                        "tenant": recorded.tenant,
                        "adapter": recorded.adapter,
                        "seq": recorded.seq,
                        "type": kind,
                        "causation": recorded.causation,
                        "data": data,
                        "blobs": recorded.blobs,
                        "hash": recorded.hash,
                    }
                    click.echo(msgspec.json.encode(line))
                else:
                    facts = msgspec.json.encode(data).decode()
                    summary = facts if len(facts) <= SUMMARY_CHARS else facts[: SUMMARY_CHARS - 1] + "…"
                    rows.append(
                        (
                            str(recorded.position),
                            when(recorded.at_us),
                            recorded.seq,
                            kind,
                            recorded.causation,
                            summary,
                        )
                    )
        if not found and not store.read(0, limit=1, adapter=adapter_id):
            raise NotFound(f"No events of an adapter {adapter_id}.")
    finally:
        store.close()
    if not as_json:
        print_table(f"Events of {adapter_id}", ("position", "at", "seq", "event", "answers", "facts"), rows)
