"""`tinkerbell audit`: verify the log, and read what happened to one adapter."""

from pathlib import Path

import click
import msgspec

from tinkerbell.cli.options import MAX_INTEGER, json_option, log_options, open_store, print_json, print_table, when
from tinkerbell.errors import Corrupt, NotFound

PAGE = 1000
SUMMARY_CHARS = 100


@click.group()
def audit() -> None:
    """Verify the log and read it.

    \b
    tinkerbell audit verify
    tinkerbell audit events ad_5h3k
    """


@audit.command()
@log_options
@json_option
def verify(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Check every event, hash chain, blob and projection. Exit status 1 names the first thing that is wrong.

    \b
    tinkerbell audit verify --json
    """
    verify_log(config, data_dir, database_url, as_json)


def verify_log(config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Run the store's own check and print its counts; a broken log is exit status 1."""
    store = open_store(config, data_dir, database_url)
    try:
        report = store.check()
    except Corrupt as exc:
        if as_json:
            print_json({"ok": False, "problem": exc.detail})
            raise SystemExit(1) from exc
        raise
    finally:
        store.close()
    counts = msgspec.to_builtins(report)
    if as_json:
        print_json({"ok": True, **counts})
    else:
        print_table("The log is whole", ("checked", "count"), list(counts.items()))


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
    store = open_store(config, data_dir, database_url)
    try:
        rows: list[tuple[object, ...]] = []
        found = False
        position = after
        while page := store.read(position, limit=PAGE, adapter=adapter_id):
            position, found = page[-1].position, True
            for recorded in page:
                data = msgspec.to_builtins(recorded.event)
                kind = data.pop("type")
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
