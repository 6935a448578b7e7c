"""What clients ask for in the crash tests: the same every time, so that the answers of two runs can be compared."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tests.crash.history import History, Recorder
from tests.support import waiting
from tinkerbell import wire
from tinkerbell.sdk import Client, Datum, Future
from tinkerbell.sdk.retry import RetryPolicy

NUM_CLIENTS = 3
PATIENCE_S = 5 * waiting.PATIENCE_S
"""How long a client waits for one answer; longer than any number of crashes and starts takes on a slow machine."""
RETRY = RetryPolicy(give_up_after_s=PATIENCE_S, first_delay_s=0.05, longest_delay_s=0.3)

Answers = list[object]
"""What a client was told, in the order of asking, without what chance decides."""


def data(client: int, step: int) -> list[Datum]:
    """Two sequences of unequal length."""
    tokens = [(11 * client + 5 * step + i) % 90 + 3 for i in range(17)]
    return [Datum(tokens=tokens[:-1], targets=tokens[1:]), Datum(tokens=tokens[:5], targets=tokens[1:6])]


@dataclass
class _Session:
    """One client's requests and what came of them."""

    client: Client
    number: int
    num_steps: int

    def run(self) -> Answers:
        rank = 2 + self.number
        adapter = self.client.add_lora(rank=rank, seed=self.number)
        futures: list[Future[object]] = []
        for step in range(self.num_steps):
            # Sent without waiting: both can be pending when something dies.
            futures.append(adapter.forward_backward(data(self.number, step)))
            if self.number == 1:
                futures.append(adapter.forward_backward(data(self.number, step + 50)))
            futures.append(adapter.optim_step(learning_rate=0.05))
            if step == self.num_steps // 2:
                futures += self._aside(adapter)
            if step % 2:
                futures[-1].result(PATIENCE_S)
        futures.append(adapter.sample([5, 6, 7], max_tokens=6, seed=3, temperature=1.0))
        answers = [_plain(future.result(PATIENCE_S)) for future in futures]
        return [*answers, adapter.info().step]

    def _aside(self, adapter: "object") -> list[Future[object]]:
        """Something else than training, by client."""
        from tinkerbell.sdk import Adapter

        assert isinstance(adapter, Adapter)
        if self.number == 0:
            saved = adapter.save("half")
            futures: list[Future[object]] = [saved, adapter.forward_backward(data(0, 70)), adapter.optim_step()]
            # Back to where it was: what came after has to be undone by a replay too.
            return [*futures, adapter.load(saved.result(PATIENCE_S).checkpoint_id)]
        if self.number == 1:
            return [adapter.forward(data(1, 80)), adapter.sample([9, 8], max_tokens=4, seed=1, num_samples=2)]
        return [self.client.sample([4, 4, 4], max_tokens=5, seed=2)]


def _plain(result: object) -> object:
    """Without the ids that chance gives."""
    if isinstance(result, wire.SaveResult | wire.LoadResult):
        return [type(result).__name__, msgspec.structs.replace(result, checkpoint_id="")]
    return result


def run(url: str, history: History, *, loss: float, seed: object, num_steps: int) -> list[Answers]:
    """All clients at once, each in a thread of its own; their answers. Raises what a client raised."""
    found: dict[int, Answers] = {}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            transport = Recorder(history, loss, f"{seed} {number}")
            with Client(url, "no-key", retry=RETRY, transport_=transport) as client:
                found[number] = _Session(client, number, num_steps).run()
        except BaseException as exc:  # noqa: BLE001 - raised below, in the thread that asked
            failures.append(exc)

    threads: Sequence[threading.Thread] = [
        threading.Thread(target=work, args=(number,), daemon=True) for number in range(NUM_CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[number] for number in range(NUM_CLIENTS)]
