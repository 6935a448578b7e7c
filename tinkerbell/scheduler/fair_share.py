"""Whose turn it is: start-time fair queueing over tenants, nested over each tenant's adapters.

Every member has a virtual time: the accelerator microseconds it was charged, over its weight. The member with
the smallest goes next. Charges are estimates at dispatch and are corrected when the batch was measured. See
Goyal, Vin & Cheng 1996 (Start-time Fair Queueing) for the rule and its bound, Sheng et al. 2024 (arXiv
2401.00588) for counters of accelerator cost in place of packet length.

Bounds, with C_i = (largest unit + the optim_step that rides along) / weight, in virtual microseconds:
- two tenants f, g backlogged all the while, over any interval of it: |S_f / w_f - S_g / w_g| <= C_f + C_g +
  credit + 2 slack + the error of the estimates still in flight. Slack counts twice: once f was served past a
  waiting g, once g past f;
- an arriving tenant's head starts after at most the running batch and one unit of each other backlogged
  tenant.
Virtual times live in memory: a new leader starts them equal, which costs at most one bound.

Pure: decisions are a function of the calls made.
"""

from collections.abc import Callable, Iterable

from tinkerbell.types import TenantId

MIN_WEIGHT = 1e-3


class _Level:
    """Start-time fair queueing over named members."""

    def __init__(self) -> None:
        self.virtual = 0.0
        """Largest start time served in its turn: what a member that returns is lifted to. Never falls."""
        self.times: dict[str, float] = {}
        self.backlogged: dict[str, int] = {}
        """Member -> arrival number, which breaks ties."""
        self._arrivals = 0

    def backlog(self, members: Iterable[str], credit: Callable[[str], float]) -> None:
        """`members` are those that want service now. One that did not before keeps no unused share: its time
        is lifted to the level's, less its credit."""
        now: dict[str, int] = {}
        for member in members:
            number = self.backlogged.get(member)
            if number is None:
                self._arrivals += 1
                number = self._arrivals
                self.times[member] = max(self.times.get(member, 0.0), self.virtual - credit(member))
            now[member] = number
        self.backlogged = now
        if len(self.times) > 2 * len(now) + 64:
            # An idle member behind its lift would be lifted anyway, so forgetting it changes nothing.
            self.times = {m: t for m, t in self.times.items() if m in now or t > self.virtual - credit(m)}

    def charge(self, member: str, amount: float, in_turn: bool) -> None:
        start = self.times[member]
        if in_turn:
            self.virtual = max(self.virtual, start)
        self.times[member] = start + amount

    def correct(self, member: str, amount: float) -> None:
        if member in self.times:
            self.times[member] += amount

    def leave(self, member: str) -> None:
        self.backlogged.pop(member, None)

    def rest(self) -> None:
        if self.times:
            self.virtual = max(self.virtual, *self.times.values())
        self.times = {}
        self.backlogged = {}


class FairShare:
    """Virtual times of tenants and of their queues (adapters)."""

    def __init__(self, credit_us: float = 0.0) -> None:
        """`credit_us`: how many microseconds (at weight 1) a tenant that returns may lag behind."""
        self.credit_us = credit_us
        self._weights: dict[TenantId, float] = {}
        self._tenants = _Level()
        self._queues: dict[TenantId, _Level] = {}

    def set_weight(self, tenant: TenantId, weight: float) -> None:
        """Share of the tenant relative to the others' (default 1), from the next charge on. At least MIN_WEIGHT:
        with 0 a tenant would never get its turn again."""
        self._weights[tenant] = max(weight, MIN_WEIGHT)

    def weight(self, tenant: TenantId) -> float:
        return self._weights.get(tenant, 1.0)

    def rest(self) -> None:
        """Nothing waits and nothing runs: a busy period is over, and the next begins with everybody level."""
        self._tenants.rest()
        self._queues = {}

    def leave(self, tenant: TenantId, queue: str, last: bool) -> None:
        """All that waited in the queue is in the batch; `last`: and so is all that waited of the tenant. What
        arrives from now on is lifted, however soon."""
        self._queues[tenant].leave(queue)
        if last:
            self._tenants.leave(tenant)

    def backlog(self, tenants: Iterable[TenantId]) -> None:
        """Before a batch is planned: who has work. Lifts those that had none."""
        self._tenants.backlog(tenants, lambda tenant: self.credit_us / self.weight(tenant))
        if len(self._queues) > 2 * len(self._tenants.times) + 64:
            self._queues = {t: level for t, level in self._queues.items() if t in self._tenants.times}

    def backlog_queues(self, tenant: TenantId, queues: Iterable[str]) -> None:
        """The same for one tenant's queues."""
        level = self._queues.get(tenant)
        if level is None:
            level = self._queues[tenant] = _Level()
        level.backlog(queues, lambda _queue: 0.0)

    def time_of(self, tenant: TenantId) -> tuple[float, int]:
        """Smallest goes first: virtual time, then order of arrival."""
        return self._tenants.times[tenant], self._tenants.backlogged[tenant]

    def time_of_queue(self, tenant: TenantId, queue: str) -> float:
        return self._queues[tenant].times[queue]

    def charge(self, tenant: TenantId, queue: str, cost_us: float, *, in_turn: bool = True) -> None:
        """A unit of this estimated cost was put into the batch. Out of turn it rides along with the one before: it
        says nothing about how far service has come, so nobody is lifted to it."""
        self._tenants.charge(tenant, cost_us / self.weight(tenant), in_turn)
        self._queues[tenant].charge(queue, cost_us, in_turn)

    def correct(self, tenant: TenantId, queue: str, difference_us: float) -> None:
        """What was charged for a unit turned out to be this much too little (or too much, if negative)."""
        self._tenants.correct(tenant, difference_us / self.weight(tenant))
        if tenant in self._queues:
            self._queues[tenant].correct(queue, difference_us)
