"""A downloaded checkpoint, from archive to directory."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tinkerbell.errors import ServerError

MAX_FILES = 64
"""Of a checkpoint, which has four."""


def unpack(content: bytes, directory: Path) -> Path:
    """Write the files of a tar archive into `directory`, which is made if needed, and return it.

    Only plain files are taken, without the directory they are in, so that an archive cannot write anywhere else, and
    none that says it is longer than the archive. Raises ServerError where it is no such archive; then nothing was
    written.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = dict(_files(archive, len(content)))
            directory.mkdir(parents=True, exist_ok=True)
            for name, member in members.items():
                part = directory / f".{name}.part"
                with part.open("wb") as file:
                    shutil.copyfileobj(archive.extractfile(member) or io.BytesIO(), file)
                part.replace(directory / name)
    except (tarfile.TarError, EOFError) as exc:
        raise ServerError(f"the downloaded checkpoint is not an archive ({exc})") from exc
    return directory


def _files(archive: tarfile.TarFile, num_bytes: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(name, member) of each."""
    for number, member in enumerate(archive):
        if number >= MAX_FILES:
            raise ServerError(f"the downloaded checkpoint has more than {MAX_FILES} files")
        if not member.isfile():
            continue
        # A sparse file of a few bytes can say that it has terabytes of zeros.
        if member.issparse() or member.offset_data + member.size > num_bytes:
            raise ServerError(f"the downloaded checkpoint was cut off in {member.name!r}, or says so of its size")
        yield _plain_name(member.name), member


def _plain_name(path: str) -> str:
    """The file's own name; archives hold their files at the top, or all in one directory."""
    parts = PurePosixPath(path).parts
    if not 1 <= len(parts) <= 2 or any(part in ("/", "..") for part in parts) or "\\" in path:
        raise ServerError(f"the downloaded checkpoint holds a file with an unexpected name: {path!r}")
    return parts[-1]
