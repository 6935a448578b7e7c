"""How many connections a server has, in all and from each address, and which of them make room for a new one."""

import ipaddress
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Closable(Protocol):
    """A connection."""

    address: str

    def evict(self) -> None:
        """End it, having no request under way."""

    def check(self, passed_s: float, now_s: float) -> None:
        """End it if it took too long; called every now and then, `passed_s` after the last time."""


class Connections:
    """All connections of a server. Used in its event loop only.

    One that has no request under way can always be ended: HTTP says so, and clients connect again. So a server that
    is full ends the one that rests for longest, first of those that never sent a request, and refuses a new one only
    where all are at work.
    """

    def __init__(self, most: int, most_per_address: int, proxies: Sequence[Network] = ()) -> None:
        """`proxies` have what there is in all: everybody's connections come from them."""
        self._most = most
        self._most_per_address = most_per_address
        self._proxies = proxies
        self._all: set[Closable] = set()
        self._by_address: Counter[str] = Counter()
        # In the order in which they came to rest.
        self._fresh: dict[Closable, None] = {}
        self._resting: dict[Closable, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Closable) -> bool:
        """Count a new connection; False where there is no room for it."""
        address = connection.address
        if self._by_address[address] >= self._most_per_address and not self._is_proxy(address):
            room = self._evict(address)
        else:
            room = len(self._all) < self._most or self._evict(None)
        if not room:
            return False
        self._all.add(connection)
        self._by_address[address] += 1
        self._fresh[connection] = None
        return True

    def remove(self, connection: Closable) -> None:
        """It has ended, or was never added."""
        if connection not in self._all:
            return
        self._all.discard(connection)
        self.at_work(connection)
        self._by_address[connection.address] -= 1
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]

    def at_work(self, connection: Closable) -> None:
        """A request has begun on it."""
        self._fresh.pop(connection, None)
        self._resting.pop(connection, None)

    def at_rest(self, connection: Closable) -> None:
        """Its requests are answered."""
        if connection in self._all:
            self._resting[connection] = None

    def check(self, passed_s: float, now_s: float) -> None:
        """Have each look at the clock."""
        for connection in list(self._all):
            connection.check(passed_s, now_s)

    def _is_proxy(self, address: str) -> bool:
        return bool(self._proxies) and any(ipaddress.ip_address(address) in network for network in self._proxies)

    def _evict(self, address: str | None) -> bool:
        """Make room; of an address, or anywhere."""
        for idle in (self._fresh, self._resting):
            for connection in idle:
                if address is None or connection.address == address:
                    self.remove(connection)
                    connection.evict()
                    return True
        return False
