"""A downloaded checkpoint, from archive to directory."""

import io
import tarfile
from pathlib import Path, PurePosixPath

from tinkerbell.errors import ServerError


def unpack(content: bytes, directory: Path) -> Path:
    """Write the files of a tar archive into `directory`, which is made if needed, and return it.

    Only plain files are taken, without the directory they are in, so that an archive cannot write anywhere
    else. Raises ServerError where it is no such archive.
    """
    try:
        files = _files(io.BytesIO(content))
    except (tarfile.TarError, EOFError) as exc:
        raise ServerError(f"the downloaded checkpoint is not an archive ({exc})") from exc
    named = {_plain_name(path): data for path, data in files.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in named.items():
        part = directory / f".{name}.part"
        part.write_bytes(data)
        part.replace(directory / name)
    return directory


def _plain_name(path: str) -> str:
    """The file's own name; archives hold their files at the top, or all in one directory."""
    parts = PurePosixPath(path).parts
    if not 1 <= len(parts) <= 2 or any(part in ("/", "..") for part in parts) or "\\" in path:
        raise ServerError(f"the downloaded checkpoint holds a file with an unexpected name: {path!r}")
    return parts[-1]


def _files(stream: io.BytesIO) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            if member.isfile() and (data := archive.extractfile(member)) is not None:
                files[member.name] = data.read()
    return files
