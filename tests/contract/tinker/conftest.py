"""A server whose requests are answered by hand, as two tenants see it."""

from collections.abc import Iterator

import msgspec
import pytest

from tests.support.api_driver import ApiDriver, record_environment
from tests.support.tinker_driver import Tinker
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore


@pytest.fixture
def api(settings: Settings, store: EventStore) -> Iterator[ApiDriver]:
    record_environment(store)
    with ApiDriver(msgspec.structs.replace(settings, auth="keys"), store) as driver:
        yield driver


@pytest.fixture
def tinker(api: ApiDriver) -> Tinker:
    return Tinker(api)
