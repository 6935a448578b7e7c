"""`state`: the weights of a run at any place, as a directory that PEFT loads."""

import asyncio
from pathlib import Path

import msgspec

from tinkerbell.executors.port import AdapterState
from tinkerbell.files import make_directory, write_private
from tinkerbell.replay.engine import Replayer
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.history import read_history
from tinkerbell.replay.integrity import Tell
from tinkerbell.replay.log import Log
from tinkerbell.replay.session import ExecutorChoice
from tinkerbell.scheduler.environments import Difference

OPTIMIZER = "optimizer.safetensors"


class StateAt(msgspec.Struct, frozen=True, kw_only=True):
    """A state, and how far it can be trusted."""

    run: str
    seq: int
    """It holds the effect of the requests up to this one."""
    step: int
    state: AdapterState
    differences: list[Difference]
    """Of the environments: empty where every digest on the way was compared bit for bit."""
    findings: list[Finding]
    """Where the way there did not come out as recorded; it stops at the first."""
    num_executed: int
    """Requests executed since the newest saved state."""


def state_at(
    log: Log,
    run: str,
    at: str,
    *,
    choice: ExecutorChoice | None = None,
    tell: Tell = lambda _what, _done, _total: None,
) -> StateAt:
    """The state after the request at `SEQ` or `step:N`: the newest saved state before it, and what came since again.

    Raises as `verify` does.
    """
    return asyncio.run(_state_at(log, run, at, choice or ExecutorChoice(), tell))


async def _state_at(log: Log, run: str, at: str, choice: ExecutorChoice, tell: Tell) -> StateAt:
    history = read_history(log, run)
    call = history.place(at)
    async with Replayer(log, history, choice, tell) as replayer:
        await replayer.begin(call.position, newest=True)
        if not replayer.stopped:
            await replayer.advance(call.position, training_only=True)
        state = await replayer.snapshot()
    assert call.request.recorded.seq is not None
    return StateAt(
        run=history.run,
        seq=call.request.recorded.seq,
        step=replayer.step,
        state=state,
        differences=replayer.differences,
        findings=replayer.findings,
        num_executed=replayer.num_executed,
    )


def write_adapter(state: AdapterState, directory: Path, *, with_optimizer: bool = False) -> list[Path]:
    """adapter_model.safetensors and adapter_config.json; Adam's moments as optimizer.safetensors if wanted."""
    files = {"adapter_model.safetensors": state.weights, "adapter_config.json": state.adapter_config}
    if with_optimizer and state.optimizer is not None:
        files[OPTIMIZER] = state.optimizer
    make_directory(directory)
    for name, data in files.items():
        write_private(directory / name, data)
    return [directory / name for name in files]
