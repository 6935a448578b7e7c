"""`tinkerbell bench fairness`: one tenant floods the server, nine light ones must not feel it."""

import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

import click
import msgspec

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.client import RawClient, training_body
from tinkerbell.cli.bench.measure import Rate, closed_loop
from tinkerbell.cli.bench.report import Report, at_least, json_file_option, publish
from tinkerbell.cli.keys import create_key
from tinkerbell.cli.process import ServerProcess
from tinkerbell.config import Settings

COLUMNS = ("tenant", "load", "steps_per_s", "of_dedicated_share", "p50_ms", "p99_ms", "accelerator_share")
FLOOD = "flood"
OPTIM_STEP = b'{"adam": {"learning_rate": 0.0001}}'


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of the run."""

    seconds: float
    num_light: int
    light_tokens: int
    """Tokens of one step of a light tenant: one fwdbwd and one optim_step, sent together, then awaited."""
    flood_tokens: int
    """Tokens of one request of the flood."""
    flood_depth: int
    """Requests the flood keeps pending."""
    flood_adapters: int
    """It sends them over so many adapters."""
    us_per_token: int
    us_per_batch: int


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Of the flood.")
@click.option("--light", "num_light", type=click.IntRange(min=1), default=9, show_default=True, help="Light tenants.")
@click.option("--light-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--flood-tokens", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option("--flood-depth", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--flood-adapters", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--us-per-token", type=click.IntRange(min=0), default=20, show_default=True, help="Simulated accelerator."
)
@click.option(
    "--us-per-batch",
    type=click.IntRange(min=0),
    default=20_000,
    show_default=True,
    help="Simulated accelerator.",
)
@json_file_option
def fairness(json_file: Path | None, **parameters: Any) -> None:
    """Steps per second of light tenants under a flood, against a dedicated share of the same machine.

    First one light tenant runs alone. Its rate divided by the number of tenants of the second run is what a
    dedicated share would give it. Then all run at once, the flood with as many large requests pending as it
    may. A fair server gives the slowest light tenant at least its dedicated share; it may give more, since
    batches are shared.

    \b
    tinkerbell bench fairness
    tinkerbell bench fairness --flood-adapters 8 --flood-tokens 64
    """
    load = msgspec.convert(parameters, Load)
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        found = run(Path(scratch) / "data", load)
    dedicated = found.alone.per_second / (load.num_light + 1)
    total_us = sum(found.served_us.values())
    rows: list[dict[str, Any]] = [{"tenant": "light-0", "load": "alone", **_numbers(found.alone, dedicated)}]
    for tenant, rate in found.lights.items():
        share = found.served_us[tenant] / total_us
        rows.append({"tenant": tenant, "load": "all at once", **_numbers(rate, dedicated), "accelerator_share": share})
    flood_share = found.served_us[FLOOD] / total_us
    rows.append(
        {
            "tenant": FLOOD,
            "load": "all at once",
            "steps_per_s": found.flood_per_second,
            "accelerator_share": flood_share,
        }
    )
    light_us = [found.served_us[tenant] for tenant in found.lights]
    extremes = {
        "dedicated_share_steps_per_s": dedicated,
        "jain_of_light_service": jain(light_us),
        "gap_of_light_service_ms": (max(light_us) - min(light_us)) / 1e3,
    }
    slowest = min(rate.per_second for rate in found.lights.values()) / dedicated
    report = Report(
        benchmark="fairness",
        parameters={**msgspec.to_builtins(load), **extremes},
        machine=facts,
        rows=rows,
        expectations=[at_least("slowest light tenant, of a dedicated share", slowest, 1.0)],
    )
    publish(report, COLUMNS, json_file)


def _numbers(rate: Rate, dedicated: float) -> dict[str, float]:
    return {
        "steps_per_s": rate.per_second,
        "of_dedicated_share": rate.per_second / dedicated,
        "p50_ms": rate.p50_ms,
        "p99_ms": rate.p99_ms,
    }


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    alone: Rate
    """A light tenant with nobody else."""
    lights: dict[str, Rate]
    """Every light tenant in the flood."""
    served_us: dict[str, int]
    """Accelerator microseconds billed in the flood, by tenant."""
    flood_per_second: float
    """Requests of the flood answered."""


def run(data_dir: Path, load: Load) -> Outcome:
    """Both phases on a fresh server."""
    tenants = [f"light-{i}" for i in range(load.num_light)]
    settings = Settings(data_dir=str(data_dir))
    keys = {tenant: create_key(settings, tenant) for tenant in (*tenants, FLOOD)}
    admin = create_key(settings, "operator", admin=True)
    options = ["--executor", "fake", "--executor-option", f"us_per_token={load.us_per_token}"]
    options += [
        "--executor-option",
        f"latency_us={load.us_per_batch}",
        "--executor-option",
        "max_length=1000000",
    ]
    with ServerProcess(data_dir, options) as server:
        clients = {tenant: RawClient(server.url, keys[tenant]) for tenant in tenants}
        steps = {tenant: LightSteps(client, load.light_tokens) for tenant, client in clients.items()}
        alone = closed_loop([steps["light-0"]], load.seconds / 2)
        watcher = RawClient(server.url, admin)
        flood = Flood(server.url, keys[FLOOD], load)
        flood.start()
        before = served_us(watcher)
        answered = flood.num_answered
        rates = rates_of_each(list(steps.values()), load.seconds)
        served = {tenant: us - before.get(tenant, 0) for tenant, us in served_us(watcher).items()}
        flood_answered = flood.num_answered - answered
        flood.stop()
        for client in (*clients.values(), watcher):
            client.close()
    return Outcome(
        alone=alone,
        lights=dict(zip(tenants, rates, strict=True)),
        served_us={tenant: served.get(tenant, 0) for tenant in keys},
        flood_per_second=flood_answered / load.seconds,
    )


class LightSteps:
    """Calling it is one training step: fwdbwd and optim_step sent together, both awaited."""

    def __init__(self, client: RawClient, tokens: int) -> None:
        self._client = client
        self._adapter = client.add_lora(1)
        self._body = training_body(tokens, min(tokens, 512))

    def __call__(self) -> None:
        gradients = self._client.post(f"/v1/adapters/{self._adapter}/fwdbwd", self._body)
        update = self._client.post(f"/v1/adapters/{self._adapter}/optim_step", OPTIM_STEP)
        self._client.result(gradients)
        self._client.result(update)


class Flood:
    """A tenant that always has `flood_depth` large requests pending."""

    def __init__(self, url: str, key: str, load: Load) -> None:
        self._client = RawClient(url, key)
        self._adapters = [self._client.add_lora(seed) for seed in range(load.flood_adapters)]
        self._body = training_body(load.flood_tokens, 512)
        self._depth = load.flood_depth
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._deep = threading.Event()
        self._failure: Exception | None = None
        self.num_answered = 0

    def start(self) -> None:
        """Begin, and return when the whole depth is pending."""
        self._thread.start()
        self._deep.wait()
        self._raise()

    def stop(self) -> None:
        """End; what is pending stays so. Raises what ended the flood early, if anything did."""
        self._stop.set()
        self._thread.join()
        self._client.close()
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        pending: deque[int] = deque()
        sent = 0
        try:
            while not self._stop.is_set():
                while len(pending) < self._depth:
                    adapter = self._adapters[sent % len(self._adapters)]
                    pending.append(self._client.post(f"/v1/adapters/{adapter}/fwdbwd", self._body))
                    sent += 1
                self._deep.set()
                self._client.result(pending.popleft())
                self.num_answered += 1
        except Exception as exc:  # noqa: BLE001  # handed to the thread that measures
            self._failure = exc
            self._deep.set()


def rates_of_each(operations: list[LightSteps], seconds: float) -> list[Rate]:
    """Rates of operations that run at the same time, one for each."""
    rates: list[Rate | Exception] = [TimeoutError("did not run") for _ in operations]

    def measure(index: int) -> None:
        try:
            rates[index] = closed_loop([operations[index]], seconds)
        except Exception as exc:  # noqa: BLE001  # raised below
            rates[index] = exc

    threads = [threading.Thread(target=measure, args=(index,), daemon=True) for index in range(len(operations))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = []
    for rate in rates:
        if isinstance(rate, Exception):
            raise rate
        found.append(rate)
    return found


def served_us(admin: RawClient) -> dict[str, int]:
    """Accelerator microseconds billed so far, by tenant."""
    return {row["tenant"]: row["cost_us"] for row in admin.call("GET", "/v1/queue?all_tenants=true")["tenants"]}


def jain(values: list[int]) -> float:
    """Jain's fairness index (sum x)^2 / (n sum x^2): 1 is equal, 1/n is one takes all (arXiv cs/9809099)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0
