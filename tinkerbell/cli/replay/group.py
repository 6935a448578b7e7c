"""`tinkerbell replay`: the group."""

import click

from tinkerbell.cli.lazy import LazyGroup

COMMANDS = {
    "runs": "tinkerbell.cli.replay.runs:runs",
    "verify": "tinkerbell.cli.replay.verify:verify",
    "state": "tinkerbell.cli.replay.state:state",
    "fork": "tinkerbell.cli.replay.fork:fork",
    "diff": "tinkerbell.cli.replay.diff:diff",
    "export": "tinkerbell.cli.replay.archive:export",
    "import": "tinkerbell.cli.replay.archive:import_",
}
"""Name -> where its click command is."""


@click.group(cls=LazyGroup, targets=COMMANDS)
def replay() -> None:
    """Execute runs again from the log and compare.

    RUN is an adapter's id, its name if only one has it, or an exported run: a file or the directory it was unpacked to.
    PLACE is a request's SEQ (as 12), or step:N for the optim_step that came to step N. The log is only read, beside a
    server that runs or without one; requests are executed in an executor of this command's own.

    \b
    tinkerbell replay runs
    tinkerbell replay verify ad_5h3k
    tinkerbell replay state ad_5h3k --at step:10 --out adapter
    tinkerbell replay fork ad_5h3k --at step:10 --set learning_rate=1e-4 --out fork
    """
