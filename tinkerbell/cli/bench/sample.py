"""`tinkerbell bench sample`: requests of many adapters at once against transformers' `generate`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.options import DEFAULT_MODEL, machine_options, progress, torch_facts
from tinkerbell.cli.bench.report import Expectation, Report, Rows, at_least, json_file_option, publish

if TYPE_CHECKING:
    from tinkerbell.cli.bench.cost import Cost

COLUMNS = ("variant", "cpu_s", "wall_s", "tokens_per_cpu_s", "tokens_per_s", "our_gain", "same_tokens")
OVER_ONE_BY_ONE = 5.0
OVER_PADDED = 1.0
EXPECTED_FROM = (16, 64)
"""Requests and tokens of each: fewer have less to share."""
OURS = "ours, one batch"
ONE_BY_ONE = "generate, one by one"
BY_ADAPTER = "generate, a batch for each adapter"
MIXED = "generate, one padded batch"


@click.command()
@click.option("--requests", type=click.IntRange(1, 1024), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Sampled for each request.")
@click.option("--adapters", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=2), default=32, show_default=True,
    help="On average; prompts have half of it to one and a half.",
)  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="The least time counts.")
@machine_options
@json_file_option
def sample(
    requests: int,
    tokens: int,
    adapters: int,
    prompt_tokens: int,
    repeats: int,
    model: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """CPU seconds of greedy samples for the requests of several adapters.

    All in one process, the variants taking turns: our executor with all requests in one batch; transformers' and
    PEFT's `generate` for one request after the other, in one padded batch for each adapter, and in one padded batch
    of all adapters (PEFT's `adapter_names`). Every sample has its full length. `same tokens` is the part of the
    samples that are, token for token, ours: where two tokens are as good as equally likely, rounding decides.
    The expectations are for the default model on a CPU, from 16 requests of 64 tokens.

    \b
    tinkerbell bench sample
    tinkerbell bench sample --requests 64 --adapters 16
    """
    from tinkerbell.executors import registry

    registry.load("hf")  # where torch is missing, this says how to install it
    from tinkerbell.cli.bench.sampling import measure

    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
    with progress("sampling") as tell:
        measured = measure(model, threads, requests, tokens, adapters, prompt_tokens, repeats, tell)
    rows = rows_of(measured.costs, measured.same, requests * tokens)
    enough = requests >= EXPECTED_FROM[0] and tokens >= EXPECTED_FROM[1]
    report = Report(
        benchmark="sample",
        parameters={
            "model": measured.model,
            "threads": threads,
            "requests": requests,
            "tokens": tokens,
            "adapters": adapters,
            "prompt_tokens": prompt_tokens,
            "repeats": repeats,
            **torch_facts(),
        },
        machine=facts,
        rows=rows,
        expectations=expectations(rows) if model == DEFAULT_MODEL and enough else [],
    )  # fmt: skip
    publish(report, COLUMNS, json_file)


def rows_of(costs: "dict[str, Cost]", same: dict[str, float], num_tokens: int) -> Rows:
    """One for each variant; `same`: part of its samples that equal ours."""
    return [
        {
            "variant": name,
            "cpu_s": cost.cpu_s,
            "wall_s": cost.wall_s,
            "tokens_per_cpu_s": num_tokens / cost.cpu_s,
            "tokens_per_s": num_tokens / cost.wall_s,
            "our_gain": cost.cpu_s / costs[OURS].cpu_s,
            "same_tokens": same[name],
        }
        for name, cost in costs.items()
    ]


def expectations(rows: Rows) -> list[Expectation]:
    """CPU seconds of the others over ours."""
    bounds = {ONE_BY_ONE: OVER_ONE_BY_ONE, MIXED: OVER_PADDED}
    return [
        at_least(f"ours over {row['variant']}", row["our_gain"], bounds[row["variant"]])
        for row in rows
        if row["variant"] in bounds
    ]
