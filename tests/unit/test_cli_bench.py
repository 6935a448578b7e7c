"""The arithmetic of the benchmarks, and that they really measure."""

import asyncio
import time

import pytest

from tinkerbell.cli.bench.attacks.table import ATTACKS
from tinkerbell.cli.bench.fairness import jain
from tinkerbell.cli.bench.measure import closed_loop, closed_loop_async, percentile
from tinkerbell.cli.bench.report import at_least, below


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, f) for f in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_closed_loop_counts_every_client() -> None:
    rate = closed_loop([lambda: time.sleep(0.01)] * 4, 0.5, warmup_s=0.05)
    assert rate.num_clients == 4
    # Four clients that each take at least 10 ms cannot do more, and do at least a few.
    assert 4 < rate.num_operations <= 4 * (rate.seconds / 0.01 + 1)
    assert rate.p50_ms >= 10
    assert rate.p99_ms >= rate.p50_ms
    assert rate.per_second == pytest.approx(rate.num_operations / rate.seconds)


def test_closed_loop_raises_what_a_client_raised() -> None:
    def fail() -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        closed_loop([lambda: time.sleep(0.01), fail], 5.0)


def test_nothing_done_is_no_rate() -> None:
    with pytest.raises(TimeoutError):
        closed_loop([lambda: time.sleep(0.5)], 0.1, warmup_s=0.0)


def test_jain() -> None:
    assert jain([5, 5, 5]) == pytest.approx(1.0)
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain([0, 0]) == 0.0


def test_expectations() -> None:
    assert at_least("gain", 8.0, 8.0).met
    assert not at_least("gain", 7.9, 8.0).met
    assert below("p50", 9.9, 10.0).met
    assert not below("p50", 10.0, 10.0).met


def test_closed_loop_of_coroutines() -> None:
    async def operation() -> None:
        await asyncio.sleep(0.01)

    rate = asyncio.run(closed_loop_async([operation] * 4, 0.3, warmup_s=0.05))
    assert 4 < rate.num_operations <= 4 * (rate.seconds / 0.01 + 1)
    assert rate.p50_ms >= 10


def test_a_coroutine_that_fails_ends_the_loop() -> None:
    async def fail() -> None:
        raise RuntimeError("refused")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(closed_loop_async([fail], 5.0))
    assert caught.group_contains(RuntimeError, match="refused")


def test_every_attack_says_what_it_does_and_has_a_function_of_its_own() -> None:
    assert all(attack.title.endswith(".") and attack.num_threads >= 1 for attack in ATTACKS.values())
    assert len({attack.run for attack in ATTACKS.values()}) == len(ATTACKS)
