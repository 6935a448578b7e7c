"""What can be checked without executing anything: hashes, bodies, blobs, and plans against the requests' own cut."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from tinkerbell.errors import Corrupt, Gone
from tinkerbell.events import kinds
from tinkerbell.events.chain import GENESIS, link
from tinkerbell.events.codec import decode_body
from tinkerbell.events.kinds import ForwardBackwardBody, PlannedUnit
from tinkerbell.replay.findings import Finding
from tinkerbell.replay.history import Call, History
from tinkerbell.replay.log import Entry, Log, blob_of, body_of, opened
from tinkerbell.scheduler.batching import cut

Tell = Callable[[str, float, float], None]
"""(what is done, done, total)."""


def check(log: Log, history: History, tell: Tell, *, head: str | None = None) -> list[Finding]:
    """Everything that is not what the log itself says it is, by position. Reads every body and blob of the run.
    `head`: hash (hex) of an event that the run must have.

    Raises Gone where some of them were erased or compacted: then the run cannot be executed again.
    """
    others = [*history.plans.values(), *history.environments.values(), *_checkpoints(log, history)]
    found = [*_chain(history), *_rows(others)]
    if head is not None and not any(each.recorded.hash == head for each in history.entries):
        last = history.entries[-1]
        found.append(Finding(what="chain", position=last.position, recorded=head, found="no event with this hash"))
    total = len(history.entries)
    gone: dict[int, Gone] = {}
    for number, each in enumerate(history.entries):
        tell("checking", number, total)
        if each.position in history.gone:
            continue
        try:
            found += _contents(log, each)
        except Gone as exc:
            # A recovery point may have been superseded since the run was read.
            if not isinstance(each.recorded.event, kinds.CheckpointWritten):
                gone[each.position] = exc
    if gone:
        first = gone[min(gone)]
        raise type(first)(
            f"{len(gone)} of the run's events have lost their bodies or blobs: {_ranges(sorted(gone))}. {first.detail}",
            positions=sorted(gone),
        )
    broken = {finding.position for finding in found}
    for call in history.calls:
        if call.position not in broken:
            found += _plan(log, call)
    return sorted(found, key=lambda finding: finding.position)


def _ranges(positions: Sequence[int]) -> str:
    """`3, 5-9`: for people, no longer than that."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and ranges[-1][1] == position - 1:
            ranges[-1][1] = position
        else:
            ranges.append([position, position])
    return ", ".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in ranges)


def _hash(columns: Entry, prev_hash: bytes) -> str:
    try:
        return link(prev_hash, columns.columns, columns.blobs).hex()
    except (TypeError, OverflowError):
        return "none: it has values that no event has"


def _chain(history: History) -> Iterator[Finding]:
    """The adapter's stream from its first event on: nothing changed, nothing left out."""
    version, prev_hash = -1, GENESIS
    for each in history.entries:
        recorded, columns = each.recorded, each.columns
        if recorded.stream != f"adapter/{history.run}":
            yield Finding(what="chain", position=each.position, recorded=recorded.stream, found="another stream")
            continue
        if recorded.stream_version != version + 1:
            text = f"version {recorded.stream_version}"
            yield Finding(what="chain", position=each.position, recorded=text, found=f"after version {version}")
        elif columns["prev_hash"] != prev_hash:
            yield Finding(
                what="chain", position=each.position, recorded=columns["prev_hash"].hex(), found=prev_hash.hex()
            )
        if recorded.hash != (found := _hash(each, columns["prev_hash"])):
            yield Finding(what="chain", position=each.position, recorded=recorded.hash, found=found)
        version, prev_hash = recorded.stream_version, columns["hash"]


def _checkpoints(log: Log, history: History) -> Iterator[Entry]:
    """Of other runs, that this one loaded."""
    for call in history.calls:
        checkpoint = getattr(call.asked, "checkpoint", None)
        if isinstance(call.asked, kinds.AddLoraRequested | kinds.LoadRequested) and checkpoint is not None:
            made = log.checkpoint(history.tenant, checkpoint)
            if made is not None and made.recorded.adapter != history.run:
                yield made


def _rows(others: Sequence[Entry]) -> Iterator[Finding]:
    """Events of whose stream only some are the run's: each by itself."""
    for each in others:
        if each.recorded.hash != (found := _hash(each, each.columns["prev_hash"])):
            yield Finding(what="chain", position=each.position, recorded=each.recorded.hash, found=found)


def _contents(log: Log, each: Entry) -> Iterator[Finding]:
    """Bodies and blobs have the bytes that were written."""
    recorded = each.recorded
    if recorded.body_codec is not None:
        try:
            stored = log.stored_body(each)
        except Corrupt as exc:
            yield Finding(what="body", position=each.position, recorded=recorded.body_hash, found=exc.detail)
        else:
            if (found := hashlib.sha256(stored).hexdigest()) != recorded.body_hash:
                yield Finding(what="body", position=each.position, recorded=recorded.body_hash, found=found)
            elif (problem := _unreadable(log, each, stored)) is not None:
                yield Finding(what="body", position=each.position, recorded=recorded.body_hash, found=problem)
    for name, digest in recorded.blobs.items():
        if name == "body":
            continue
        try:
            blob_of(log, digest)
        except Corrupt as exc:
            yield Finding(what="body", position=each.position, recorded=f"{name} {digest}", found=exc.detail)


def _unreadable(log: Log, each: Entry, stored: bytes) -> str | None:
    """Why a body with the right hash cannot be read; None where it can."""
    recorded = each.recorded
    assert recorded.body_codec is not None
    try:
        decode_body(kinds.type_of(recorded.event), recorded.body_codec, opened(log, stored))
    except Corrupt as exc:
        return exc.detail
    return None


def _plan(log: Log, call: Call) -> Iterator[Finding]:
    """What was planned of a request is what its own rule cuts it into; it ran whole, once, in the end."""
    if call.answer is None or isinstance(call.answer, kinds.Failed):
        return
    if getattr(call.answer, "batch", None) is None:
        return
    planned = [(unit.start, unit.stop) for unit in call.units]
    expected = _cut(log, call)
    if expected is None:
        fits = _tiles(call.units, call)
        text = "its samples"
    else:
        fits = set(planned) <= set(expected) and ran_whole(planned, expected)
        text = str(expected)
    if not fits or call.environment is None:
        yield Finding(
            what="plan",
            position=call.position,
            seq=call.request.recorded.seq,
            kind=call.kind,
            recorded=f"planned {planned or 'nothing'}",
            found=f"it is cut into {text}",
        )


def _cut(log: Log, call: Call) -> list[tuple[int, int]] | None:
    """Ranges of a request's units; None for samples, whose cut depends on the server's settings."""
    match call.asked:
        case kinds.ForwardRequested(chunk_tokens=tokens) | kinds.ForwardBackwardRequested(chunk_tokens=tokens):
            body = body_of(log, call.request)
            assert isinstance(body, ForwardBackwardBody)
            return cut([datum.num_tokens for datum in body.data], tokens)
        case kinds.SampleRequested():
            return None
        case _:
            return [(0, 0)]


def ran_whole(planned: Sequence[tuple[int, int]], expected: Sequence[tuple[int, int]]) -> bool:
    """Whether the last of the planned units are the expected ones, in order.

    What comes before was lost with an executor or a leader: then a request starts afresh. A unit may stand there twice
    running: a batch that could not be made is planned again.
    """
    left = len(expected) - 1
    for unit in reversed(planned):
        if unit == expected[left]:
            left -= 1
            if left < 0:
                return True
        elif left + 1 >= len(expected) or unit != expected[left + 1]:
            return False
    return False


def _tiles(units: Sequence[PlannedUnit], call: Call) -> bool:
    """Whether the last units are all samples, one after another."""
    assert isinstance(call.asked, kinds.SampleRequested)
    start = end = call.asked.params.num_samples
    for unit in reversed(units):
        if unit.stop == start:
            start, end = unit.start, unit.stop
            if start == 0:
                return True
        elif (unit.start, unit.stop) != (start, end):
            return False
    return False
