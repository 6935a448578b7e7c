"""`tinkerbell keys`: API keys, which make a server multi-tenant."""

import hashlib
import secrets
from base64 import b32encode
from pathlib import Path

import click
import msgspec

from tinkerbell.cli.options import (
    json_option,
    log_options,
    open_store,
    print_json,
    print_table,
    settings_of,
    when,
)
from tinkerbell.config import Settings
from tinkerbell.errors import Conflict, NotFound
from tinkerbell.types import SYSTEM_TENANT, Name


class Tenant(click.ParamType[str]):
    """A tenant's name, checked before anything is opened."""

    name = "tenant"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            name = msgspec.convert(value, Name)
        except msgspec.ValidationError:
            self.fail(f"{value!r} is not a name: 1 to 64 letters, digits, dots, dashes, underscores", param, ctx)
        if name == SYSTEM_TENANT:
            self.fail(f"{value!r} belongs to the server itself", param, ctx)
        return name


TENANT = Tenant()


def create_key(settings: Settings, tenant: str, *, admin: bool = False, note: str = "") -> str:
    """Append a new key of `tenant` to the log; returns `tb-<key id>-<secret>`, the secret 256 random bits."""
    from tinkerbell.cli.database import prepare
    from tinkerbell.events.kinds import KeyCreated, NewEvent
    from tinkerbell.events.store import EventStore

    prepare(settings)  # Keys are made before the first start of a server that listens beyond loopback.
    key_id = "k_" + b32encode(secrets.token_bytes(10)).decode().lower()
    secret = secrets.token_urlsafe(32)
    event = KeyCreated(key_id=key_id, key_hash=hashlib.sha256(secret.encode()).hexdigest(), admin=admin, note=note)
    store = EventStore.open(settings)
    try:
        if store.queries.was_erased(tenant):
            raise Conflict(
                f"Tenant {tenant} was erased: what its events say stays in the log under this name, and whoever got a"
                " key of it would see that. Give another name."
            )
        store.append(NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}"))
    finally:
        store.close()
    return f"tb-{key_id}-{secret}"


@click.group()
def keys() -> None:
    """Make, list and revoke API keys.

    As soon as there is one key, every request needs one.

    \b
    tinkerbell keys create alice --note laptop
    tinkerbell keys list
    tinkerbell keys revoke k_3q7x
    """


@keys.command()
@click.argument("tenant", type=TENANT)
@click.option("--admin", is_flag=True, help="May see every tenant's queue and usage.")
@click.option("--note", default="", help="For you to remember it by.")
@log_options
@json_option
def create(
    tenant: str,
    admin: bool,
    note: str,
    config: Path | None,
    data_dir: str | None,
    database_url: str | None,
    as_json: bool,
) -> None:
    """Make a key for TENANT and print it, once: only its hash is kept.

    \b
    tinkerbell keys create alice
    """
    settings = settings_of(config, data_dir=data_dir, database_url=database_url)
    key = create_key(settings, tenant, admin=admin, note=note)
    key_id = key.split("-", 2)[1]
    if as_json:
        print_json({"key_id": key_id, "tenant": tenant, "admin": admin, "key": key})
    else:
        click.echo(f"Key {key_id} of {tenant}{' (admin)' if admin else ''}. It is shown this once:", err=True)
        click.echo(key)


@keys.command(name="list")
@click.option("--tenant", type=TENANT, help="Of this tenant only.")
@log_options
@json_option
def list_keys(
    tenant: str | None, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool
) -> None:
    """List keys, revoked ones too; never their secrets.

    \b
    tinkerbell keys list --tenant alice
    """
    store = open_store(config, data_dir, database_url)
    try:
        found = store.queries.keys(tenant)
    finally:
        store.close()
    if as_json:
        fields = ("key_id", "tenant", "admin", "note", "created_us", "revoked_us")
        print_json([{name: getattr(key, name) for name in fields} for key in found])
        return
    print_table(
        "API keys",
        ("key", "tenant", "admin", "note", "created", "revoked"),
        [(k.key_id, k.tenant, bool(k.admin), k.note, when(k.created_us), when(k.revoked_us)) for k in found],
    )


@keys.command()
@click.argument("key_id")
@log_options
@json_option
def revoke(key_id: str, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool) -> None:
    """Revoke KEY_ID: it opens nothing from now on.

    \b
    tinkerbell keys revoke k_3q7x
    """
    from tinkerbell.events.kinds import KeyRevoked, NewEvent

    store = open_store(config, data_dir, database_url)
    try:
        key = store.queries.key(key_id)
        if key is None:
            raise NotFound(f"No key {key_id}.")
        if key.revoked_us is None:
            store.append(NewEvent(event=KeyRevoked(key_id=key_id), tenant=key.tenant, stream=f"tenant/{key.tenant}"))
    finally:
        store.close()
    if as_json:
        print_json({"key_id": key_id, "tenant": key.tenant, "revoked": True})
    else:
        click.echo(f"{key_id} of {key.tenant} is revoked.")
