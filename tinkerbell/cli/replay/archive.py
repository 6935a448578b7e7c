"""`tinkerbell replay export` and `import`: a run in one file, for another machine."""

from pathlib import Path

import click

from tinkerbell.cli.options import json_option, log_options, print_json
from tinkerbell.cli.replay.options import log_of, progress


@click.command()
@click.argument("run")
@click.option(
    "-o", "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write; a zip archive."
)
@log_options
@json_option
def export(
    run: str, out: Path, config: Path | None, data_dir: str | None, database_url: str | None, as_json: bool
) -> None:
    """Write RUN to one file: its events, data, checkpoints, plans and environments, with a hash of each.

    It holds the data the run was trained on. Every replay command takes the file in the place of RUN, on any machine
    that has the base model. Keep the head it prints elsewhere: `replay verify FILE --head` tells whether the file was
    written anew or cut off.

    \b
    tinkerbell replay export ad_5h3k --out run.zip
    tinkerbell replay verify run.zip
    """
    from tinkerbell import replay

    with log_of(run, config, data_dir, database_url) as (log, name), progress(f"export {name}") as tell:
        manifest = replay.export(log, name, out, tell=tell)
    if as_json:
        print_json({"file": str(out), "run": manifest.run, "num_events": manifest.num_events, "head": manifest.head})
    else:
        click.echo(f"{out}: run {manifest.run}, {manifest.num_events} events, {len(manifest.files)} files")
        click.echo(f"head {manifest.head}")


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@json_option
def import_(file: Path, directory: Path, as_json: bool) -> None:
    """Check FILE, which export wrote, against its hashes, and unpack it into an empty DIRECTORY.

    The directory can be given as RUN, as the file itself can. It is for reading: no server goes on with the run.

    \b
    tinkerbell replay import run.zip run
    tinkerbell replay verify run
    """
    from tinkerbell import replay

    manifest = replay.unpack(file, directory)
    if as_json:
        print_json({"directory": str(directory), "run": manifest.run, "num_events": manifest.num_events})
    else:
        click.echo(f"{directory}: run {manifest.run}, {manifest.num_events} events")
