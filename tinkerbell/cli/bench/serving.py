"""The same training steps through a server and on its executor alone, in turn."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from tinkerbell import wire
from tinkerbell.cli.bench.client import RawClient
from tinkerbell.cli.bench.options import Tell
from tinkerbell.cli.bench.ours import DEVICE, Ours
from tinkerbell.cli.bench.processes import cpu_seconds, peak_rss_bytes, reset_peaks
from tinkerbell.cli.bench.server import EXECUTOR, SERVER, Measured, Spent
from tinkerbell.cli.bench.workload import Tenant, tenants
from tinkerbell.cli.process import ServerProcess
from tinkerbell.types import AdamParams, Datum

ADAM = AdamParams(learning_rate=1e-4)
READY_S = 300.0
"""The first start converts the model."""


def measure(
    data_dir: Path, model: str, threads: int, num_clients: int, steps: int, repeats: int, length: str, tell: Tell
) -> Measured:
    """Rounds of `steps` steps of all clients; the first round of each way is not timed."""
    tell("loading the model", 0, 1)
    ours = Ours(model, threads)
    load = tenants(length, num_clients, ours.info.vocab_size)
    for seed, tenant in enumerate(load):
        ours.executor.create(tenant.adapter, tenant.lora, seed)
    spent = {EXECUTOR: Spent(), SERVER: Spent()}
    options = ["--executor", "hf", "--model", model, "--threads", str(threads)]
    options += [part for name, value in DEVICE.items() for part in ("--executor-option", f"{name}={value}")]
    with ServerProcess(data_dir, options, ready_s=READY_S) as server, ThreadPoolExecutor(num_clients) as threads_pool:
        clients = [Client(server.url, tenant, seed) for seed, tenant in enumerate(load)]
        digests: dict[str, list[str]] = {}
        reset_peaks(server.pid)  # loading the model takes more for a moment
        for turn in range(repeats + 1):
            tell(EXECUTOR, 2 * turn, 2 * repeats + 2)
            cpu, wall = time.process_time(), time.perf_counter()
            digests[EXECUTOR] = alone(ours, load, steps)
            if turn:
                spent[EXECUTOR].add(time.process_time() - cpu, time.perf_counter() - wall)
            tell(SERVER, 2 * turn + 1, 2 * repeats + 2)
            cpu, wall = cpu_seconds(server.pid), time.perf_counter()
            digests[SERVER] = list(threads_pool.map(lambda client: client.train(steps), clients))
            if turn:
                spent[SERVER].add(cpu_seconds(server.pid) - cpu, time.perf_counter() - wall)
        rss_mb = peak_rss_bytes(server.pid) / 1e6
        for client in clients:
            client.close()
    return Measured(
        model=ours.info.name,
        num_tokens=steps * sum(tenant.num_tokens for tenant in load),
        spent=spent,
        rss_mb=rss_mb,
        same_bits=digests[EXECUTOR] == digests[SERVER],
    )


def alone(ours: Ours, load: Sequence[Tenant], steps: int) -> list[str]:
    """State digests of the adapters after so many more steps."""
    digests: list[str] = []
    for _ in range(steps):
        digests = ours.step(load, ADAM)
    return digests


class Client:
    """One user with an adapter, who trains."""

    def __init__(self, url: str, tenant: Tenant, seed: int) -> None:
        self._http = RawClient(url)
        adapter = self._http.add_lora(seed, tenant.lora)
        self._path = f"/v1/adapters/{adapter}"
        self._data = msgspec.json.encode(wire.ForwardBackward(data=[_body(datum) for datum in tenant.data]))
        self._adam = msgspec.json.encode(wire.OptimStep(adam=ADAM))

    def train(self, steps: int) -> str:
        """The adapter's state digest after so many more steps."""
        digest = ""
        for _ in range(steps):
            gradient = self._http.post(f"{self._path}/fwdbwd", self._data)
            update = self._http.post(f"{self._path}/optim_step", self._adam)
            self._http.result(gradient)
            digest = self._http.result(update)["result"]["state_digest"]
        return digest

    def close(self) -> None:
        """End its connection."""
        self._http.close()


def _body(datum: Datum) -> wire.DatumBody:
    return wire.DatumBody(
        tokens=np.frombuffer(datum.tokens, "<i4").tolist(),
        targets=np.frombuffer(datum.targets, "<i4").tolist(),
        loss_inputs={name: np.frombuffer(array, "<f4").tolist() for name, array in datum.loss_inputs.items()},
    )
