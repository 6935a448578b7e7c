"""The state of a server's database before it is opened: missing, empty, outdated or ready."""

from tinkerbell.config import Settings
from tinkerbell.errors import NotFound, SchemaOutdated
from tinkerbell.events import schema
from tinkerbell.events.engine import parse_url


def shown(url: str) -> str:
    """The URL as it may be printed: without its password."""
    return parse_url(url).render_as_string(hide_password=True)


def require_log(settings: Settings) -> None:
    """Raise NotFound unless a server has written here; SchemaOutdated if its schema is an old one."""
    if schema.is_empty(settings.url):
        raise NotFound(f"No log in {shown(settings.url)}; say where with --data-dir or --database-url.")
    require_current(settings)


def require_current(settings: Settings) -> None:
    """Raise SchemaOutdated, with the command to run, unless the schema is this release's."""
    if not schema.is_current(settings.url):
        raise SchemaOutdated(f"{shown(settings.url)}: after a backup, run `tinkerbell db upgrade{where(settings)}`.")


def prepare(settings: Settings) -> bool:
    """Make the schema of an empty database; refuse an old one. True if it was empty."""
    if schema.is_empty(settings.url):
        schema.upgrade(settings.url)
        return True
    require_current(settings)
    return False


def where(settings: Settings) -> str:
    """The options that lead another command to the same log."""
    defaults = Settings()
    if settings.database_url is not None:
        return f" --database-url {shown(settings.url)}"
    return "" if settings.data_dir == defaults.data_dir else f" --data-dir {settings.data_dir}"
