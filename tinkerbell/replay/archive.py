"""A run in one file: rows as they are stored, bodies, blobs and a manifest of hashes. It is a log to replay from.

    manifest.json            what it is, and the sha256 of every other file
    events.jsonl             a row of `events` a line, bytes in hex, without the body
    bodies/<position>        stored bytes of an inline body
    blobs/<sha256>           everything else

Bodies and blobs that are encrypted stay so, since the hashes are over the encrypted bytes; the manifest has the key of
each, which opens nothing else: not the rest of what its tenant has stored. Whoever has the archive can read all of it,
and erasing the tenant does not reach it.

Rows keep their positions and hashes: the adapter's stream is whole, so its chain verifies from its first event on; of
batches, environments and other adapters' checkpoints only those that the run names are there. The file (zip) can be
read as it is, or be unpacked into a directory, which can be read as well.
"""

import hashlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from tinkerbell.errors import Conflict, Corrupt, InvalidRequest, NotFound
from tinkerbell.events import envelope, kinds
from tinkerbell.events.kinds import BodyCodec, type_of
from tinkerbell.files import make_directory, open_private, write_private
from tinkerbell.replay.archive_files import (
    MAX_LIST_BYTES,
    UNREADABLE,
    DirectoryFiles,
    Files,
    ZipFiles,
    chunks,
    copy,
    lines,
    require_room,
)
from tinkerbell.replay.history import History, read_history
from tinkerbell.replay.integrity import Tell
from tinkerbell.replay.log import COLUMNS, Entry, Log, entry

FORMAT = "tinkerbell-run"
PLAIN, WITH_KEYS = 1, 2
"""Versions: a release that does not know keys must not take encrypted bytes for broken ones."""
MANIFEST, EVENTS = "manifest.json", "events.jsonl"
BINARY = tuple(column.name for column in COLUMNS if column.name in ("request_hash", "body_hash", "prev_hash", "hash"))
NAME = re.compile(r"events\.jsonl|bodies/[0-9]+|blobs/[0-9a-f]{64}")
"""Of a file in an archive: nothing else is ever written anywhere."""


MAX_EVENTS = 50_000_000


class _Columns(msgspec.Struct):
    """Types of a row's columns; those that are never NULL have to be there."""

    position: int
    stream: str
    stream_version: int
    type: str
    schema_version: int
    tenant: str
    data: str
    num_blobs: int
    created_us: int
    prev_hash: bytes
    hash: bytes
    adapter: str | None = None
    seq: int | None = None
    causation: int | None = None
    correlation: str | None = None
    actor: str | None = None
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    body_codec: BodyCodec | None = None
    body_hash: bytes | None = None
    body_len: int | None = None
    fence_resource: str | None = None
    fence_epoch: int | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an archive is."""

    format: str
    version: int
    run: str
    tenant: str
    name: str | None
    made_by: str
    """Release that wrote it."""
    num_events: int
    files: dict[str, str]
    """Name -> sha256 (hex)."""
    head: str = ""
    """Hash (hex) of the run's last event. Kept elsewhere it tells later whether the archive is still the one."""
    keys: dict[str, str] = {}
    """sha256 (hex) of an encrypted body or blob as stored -> its key (hex); see events/envelope.py."""
    superseded: list[int] = []
    """Positions of the server's recovery points whose bytes were gone already."""


def export(log: Log, run: str, file: Path, *, tell: Tell = lambda _what, _done, _total: None) -> Manifest:
    """Write a run to `file`, which must not exist. Raises Conflict, NotFound, Corrupt where bytes have changed,
    Erased, KeyUnavailable."""
    if file.exists():
        raise Conflict(f"{file} exists; an archive is never written over")
    history = read_history(log, run)
    entries = _entries(log, history)
    part = file.with_name(f".{file.name}.part")
    files: dict[str, str] = {}
    keys: dict[str, str] = {}
    try:
        with open_private(part, "wb") as file_out, zipfile.ZipFile(file_out, "w", zipfile.ZIP_DEFLATED) as archive:

            def add(name: str, data: bytes) -> None:
                if name not in files:
                    files[name] = hashlib.sha256(data).hexdigest()
                    # A fixed time: the same run gives the same file.
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)

            def add_stored(name: str, stored: bytes) -> None:
                add(name, stored)
                if (key := log.key_of(stored)) is not None:
                    keys[files[name]] = key.hex()

            for number, each in enumerate(entries):
                tell("writing", number, len(entries))
                for digest in () if each.position in history.gone else each.recorded.blobs.values():
                    add_stored(f"blobs/{digest}", log.stored_blob(digest))
                if each.recorded.body_codec is not None and "body" not in each.blobs:
                    add_stored(f"bodies/{each.position}", log.stored_body(each))
            add(EVENTS, b"".join(_line(each) + b"\n" for each in entries))
            manifest = Manifest(
                format=FORMAT,
                version=WITH_KEYS if keys else PLAIN,
                run=history.run,
                tenant=history.tenant,
                name=history.name,
                made_by=version("tinkerbell-server"),
                num_events=len(entries),
                head=history.entries[-1].recorded.hash,
                files=dict(sorted(files.items())),
                keys=dict(sorted(keys.items())),
                superseded=sorted(history.gone),
            )
            text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
            archive.writestr(zipfile.ZipInfo(MANIFEST, (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return manifest


def unpack(file: Path, directory: Path) -> Manifest:
    """Write an archive's files into an empty or new directory, once each was checked against the manifest.

    Raises Conflict where there is something already, InvalidRequest for what is no archive, Corrupt; then the directory
    is as it was.
    """
    if directory.exists() and any(directory.iterdir()):
        raise Conflict(f"{directory} is not empty")
    make_directory(directory.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with closing(ArchiveLog.open(file)) as log:
            log.unpack(part)
            write_private(part / MANIFEST, msgspec.json.encode(log.manifest))
            part.replace(directory)
            return log.manifest
    except BaseException:
        shutil.rmtree(part)
        raise


class ArchiveLog:
    """An exported run as a log. Every file is checked against the manifest when it is read."""

    foreign = True

    def __init__(self, files: Files, name: str) -> None:
        self.name = name
        self._files = files
        self.manifest = self._manifest()
        if self.manifest.num_events > MAX_EVENTS:
            raise InvalidRequest(f"{name} has {self.manifest.num_events} events; a run has {MAX_EVENTS} at most")
        self._rows: list[Entry] = []
        for line in lines(self._parts(EVENTS), f"{name}: {EVENTS}"):
            self._rows.append(_row(line))
            if len(self._rows) > self.manifest.num_events:
                break
        if len(self._rows) != self.manifest.num_events:
            raise Corrupt(f"{name} has {len(self._rows)} events, and {self.manifest.num_events} were exported")
        if not any(each.recorded.adapter == self.manifest.run for each in self._rows):
            raise Corrupt(f"{name} has no event of its run {self.manifest.run}")

    @classmethod
    def open(cls, path: Path) -> "ArchiveLog":
        """A file that `export` wrote, or the directory `unpack` made of it. Raises InvalidRequest, Corrupt."""
        files = DirectoryFiles(path) if path.is_dir() else ZipFiles(path)
        try:
            return cls(files, str(path))
        except BaseException:
            files.close()
            raise

    def read(self, name: str) -> bytes:
        """A file of the archive. Raises Corrupt where it is missing or not what the manifest says."""
        return b"".join(self._parts(name))

    def unpack(self, directory: Path) -> None:
        """Write all files but the manifest into a directory. Raises as `read` does, InvalidRequest for want of room."""
        try:
            require_room(self._files, iter(self.manifest.files), directory)
        except UNREADABLE as exc:
            raise Corrupt(f"{self.name} has not all files that its manifest names: {exc}") from exc
        for name in self.manifest.files:
            copy(self._parts(name), directory / name)

    def _parts(self, name: str) -> Iterator[bytes]:
        digest = self.manifest.files.get(name)
        if digest is None:
            raise Corrupt(f"{self.name} has no {name}")
        try:
            yield from chunks(self._files, name, digest)
        except Corrupt as exc:
            raise Corrupt(f"{self.name}: {exc.detail}") from exc

    def entries(
        self,
        after: int = 0,
        *,
        until: int | None = None,
        tenant: str | None = None,
        adapter: str | None = None,
        types: Collection[str] | None = None,
    ) -> Iterator[Entry]:
        """See log.Log."""
        for each in self._rows:
            if each.position <= after or (until is not None and each.position > until):
                continue
            if tenant is not None and each.recorded.tenant != tenant:
                continue
            if adapter is not None and each.recorded.adapter != adapter:
                continue
            if types is None or each.columns["type"] in types:
                yield each

    def named(self, name: str) -> list[str]:
        """See log.Log."""
        return [self.manifest.run] if self.manifest.name == name else []

    def checkpoint(self, tenant: str, checkpoint: str) -> Entry | None:
        """See log.Log."""
        for each in self._rows:
            event = each.recorded.event
            made = isinstance(event, kinds.AnyCheckpoint) and event.checkpoint == checkpoint
            if made and each.recorded.tenant == tenant:
                return each
        return None

    def stored_body(self, at: Entry) -> bytes:
        """See log.Log."""
        if "body" in at.blobs:
            return self.stored_blob(at.blobs["body"].hex())
        return self.read(f"bodies/{at.position}")

    def stored_blob(self, digest: str) -> bytes:
        """See log.Log."""
        data = self.read(f"blobs/{digest}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"{self.name}: blob {digest} has other bytes than were written")
        return data

    def key_of(self, stored: bytes) -> bytes | None:
        """See log.Log."""
        if not envelope.is_envelope(stored):
            return None
        digest = hashlib.sha256(stored).hexdigest()
        key = self.manifest.keys.get(digest, "")
        if re.fullmatch("[0-9a-f]{64}", key) is None:
            raise Corrupt(f"{self.name} has no key of {digest}, which is encrypted")
        return bytes.fromhex(key)

    def removed(self, positions: Collection[int]) -> set[int]:
        """See log.Log."""
        return set(self.manifest.superseded).intersection(positions)

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def _manifest(self) -> Manifest:
        try:
            text = b"".join(chunks(self._files, MANIFEST, None, limit=MAX_LIST_BYTES))
            manifest = msgspec.json.decode(text, type=Manifest)
        except (Corrupt, msgspec.DecodeError) as exc:
            raise InvalidRequest(f"{self.name} is not an exported run: {exc}") from exc
        if manifest.format != FORMAT or manifest.version not in (PLAIN, WITH_KEYS):
            what = f"{manifest.format} version {manifest.version}"
            raise InvalidRequest(f"{self.name} is {what}; this release reads {FORMAT} versions 1 and 2")
        for name in manifest.files:
            if NAME.fullmatch(name) is None:
                raise InvalidRequest(f"{self.name} has a file with an unexpected name: {name!r}")
        return manifest


def _entries(log: Log, history: History) -> list[Entry]:
    """Every event that a replay of the run reads, by position."""
    found = [*history.entries, *history.plans.values(), *history.environments.values()]
    for call in history.calls:
        checkpoint = getattr(call.asked, "checkpoint", None)
        if isinstance(call.asked, kinds.AddLoraRequested | kinds.LoadRequested) and checkpoint is not None:
            made = log.checkpoint(history.tenant, checkpoint)
            if made is not None:
                found.append(made)
            elif isinstance(call.answer, kinds.AddLoraCompleted | kinds.LoadCompleted):
                raise NotFound(f"the run needs checkpoint {checkpoint}, which is not in {log.name}")
    return sorted({each.position: each for each in found}.values(), key=lambda each: each.position)


def _line(each: Entry) -> bytes:
    columns = {
        name: value.hex() if name in BINARY and value is not None else value for name, value in each.columns.items()
    }
    blobs = {name: digest.hex() for name, digest in each.blobs.items()}
    return msgspec.json.encode({"columns": columns, "blobs": blobs})


def _row(line: bytes) -> Entry:
    try:
        value: dict[str, dict[str, Any]] = msgspec.json.decode(line, type=dict[str, dict[str, Any]])
        columns: dict[str, Any] = {
            name: bytes.fromhex(found) if name in BINARY and found is not None else found
            for name, found in value["columns"].items()
        }
        msgspec.convert(columns, _Columns)
        row = entry(columns, {name: bytes.fromhex(digest) for name, digest in value["blobs"].items()})
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as exc:
        raise Corrupt(f"an event of the archive cannot be read: {exc}") from exc
    if type_of(row.recorded.event) != columns["type"]:
        raise Corrupt(f"event {row.position}: the type is {columns['type']}, the data says otherwise")
    return row
