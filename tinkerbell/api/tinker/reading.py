"""Rows and results of the log as the tinker protocol has them."""

import logging
from typing import Any

from tinkerbell.api.tinker import codec, names
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import Corrupt, KeyUnavailable
from tinkerbell.events import kinds
from tinkerbell.events.kinds import Recorded
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.events.store import EventStore

log = logging.getLogger("tinkerbell.api")


def path_of(row: CheckpointRow) -> names.Path:
    """Of a checkpoint; one that was saved through `/v1` is called by its id where it has no name."""
    return names.Path(row.adapter, row.use, row.name or row.id)


def checkpoint(row: CheckpointRow) -> dict[str, Any]:
    """A checkpoint in a list."""
    path = path_of(row)
    return {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": names.CHECKPOINT_TYPES[row.use],
        "time": rfc3339(row.created_us),
        "tinker_path": str(path),
        "size_bytes": row.num_bytes,
        "public": row.published,
        "user_metadata": row.user_metadata or None,
        "expires_at": None if row.expires_us is None else rfc3339(row.expires_us),
    }


def answer(store: EventStore, request: Recorded, result: Recorded) -> bytes | dict[str, Any]:
    """What became of a request: protobuf, or what is sent as JSON; a failure where the log cannot give it back."""
    try:
        return _answer(store, request, result)
    except (Corrupt, KeyUnavailable) as exc:
        log.error("the answer of request %d cannot be read: %s", request.position, exc)
        return {"error": f"The answer cannot be read: {exc.detail}", "category": "server"}


def _answer(store: EventStore, request: Recorded, result: Recorded) -> bytes | dict[str, Any]:
    for recorded in (result, request):
        if isinstance(recorded.event, kinds.Unreadable) and not isinstance(result.event, kinds.Failed):
            raise Corrupt(f"event {recorded.position}: {recorded.event.why}")
    match result.event:
        case kinds.Failed() as failed:
            return {"error": failed.message, "category": failed.category}
        case kinds.ForwardCompleted() | kinds.ForwardBackwardCompleted() as done:
            return codec.forward_backward_output(result.position, done, store.body(result))
        case kinds.SampleCompleted():
            assert isinstance(request.event, kinds.SampleRequested)
            return codec.sample_response(result.position, request.event, store.body(request), store.body(result))
        case kinds.OptimStepCompleted() as done:
            return {"type": "optim_step", "metrics": {"grad_norm": done.grad_norm, "step": float(done.step)}}
        case kinds.AddLoraCompleted():
            assert isinstance(request.event, kinds.AddLoraRequested)
            if request.event.checkpoint is None:
                return {"type": "create_model", "model_id": request.adapter}
            return _loaded(store, request, request.event.checkpoint)
        case kinds.LoadCompleted() as done:
            return _loaded(store, request, done.checkpoint)
        case kinds.SaveCompleted():
            return _saved(request, result.event)
        case kinds.RemoveLoraCompleted():
            return {"type": "unload_model", "model_id": request.adapter}
        case other:
            raise Corrupt(f"event {result.position} ({kinds.type_of(other)}) is no result")


def _loaded(store: EventStore, request: Recorded, id: str) -> dict[str, Any]:
    row = store.queries.checkpoint(request.tenant, id)
    if row is None:
        raise Corrupt(f"event {request.position} names the checkpoint {id}, which is not there")
    return {"type": "load_weights", "path": str(path_of(row)), "model_id": request.adapter}


def _saved(request: Recorded, done: kinds.SaveCompleted) -> dict[str, Any]:
    asked = request.event
    assert isinstance(asked, kinds.SaveRequested) and request.adapter is not None
    if asked.sampler is not None:
        return {"type": "save_weights_for_sampler", "path": None, "sampling_session_id": asked.sampler}
    path = str(names.Path(request.adapter, done.use, done.name or done.checkpoint))
    match done.use:
        case "sampler":
            return {"type": "save_weights_for_sampler", "path": path}
        case "external":
            return {"type": "save_weights_external", "path": path, "size_bytes": done.num_bytes}
        case "state":
            return {"type": "save_weights", "path": path}
