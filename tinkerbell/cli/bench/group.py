"""`tinkerbell bench`: the group of benchmarks."""

import click

from tinkerbell.cli.lazy import LazyGroup

BENCHMARKS = {
    "store": "tinkerbell.cli.bench.store:store",
    "overhead": "tinkerbell.cli.bench.overhead:overhead",
    "fairness": "tinkerbell.cli.bench.fairness:fairness",
    "train": "tinkerbell.cli.bench.train:train",
    "sample": "tinkerbell.cli.bench.sample:sample",
    "server": "tinkerbell.cli.bench.server:server",
    "recovery": "tinkerbell.cli.bench.recovery:recovery",
    "scale": "tinkerbell.cli.bench.scale:scale",
    "neighbour": "tinkerbell.cli.bench.neighbour:neighbour",
}
"""Name -> where its click command is."""


@click.group(cls=LazyGroup, targets=BENCHMARKS)
def bench() -> None:
    """Measure this machine. Each benchmark prints its parameters and what it ran on.

    \b
    tinkerbell bench store
    tinkerbell bench overhead --json overhead.json
    tinkerbell bench fairness
    tinkerbell bench train --plot train.png
    tinkerbell bench sample
    tinkerbell bench server
    tinkerbell bench recovery
    tinkerbell bench scale
    tinkerbell bench neighbour
    """
