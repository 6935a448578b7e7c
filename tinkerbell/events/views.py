"""What the SQL views for auditors mean. Their SQL is in the migrations, the same on SQLite and Postgres."""

import msgspec


class View(msgspec.Struct, frozen=True):
    """One view."""

    description: str
    columns: dict[str, str]
    """Column -> what it holds, in order."""


_TENANT = "who it belongs to"
_AT = "microseconds since 1970, UTC"
_COST = "seconds of accelerator time charged"

VIEWS: dict[str, View] = {
    "audit_events": View(
        "Every event of the log, without bodies and hashes.",
        {
            "position": "1, 2, 3, ... in commit order",
            "created_us": _AT,
            "tenant": _TENANT,
            "actor": "API key that asked, or the scheduler that acted",
            "adapter": "adapter it is about, if any",
            "seq": "of a request: its place among its adapter's requests",
            "type": "what happened",
            "causation": "of a result: position of the request it answers",
            "correlation": "trace id of the HTTP request",
            "data": "the event as canonical JSON",
            "body_len": "bytes of its arrays before compression",
            "num_blobs": "blobs it names",
        },
    ),
    "audit_optim_steps": View(
        "Every optimizer step that was taken, with what was asked for and what came out.",
        {
            "position": "of the result",
            "created_us": _AT,
            "tenant": _TENANT,
            "adapter": "which adapter",
            "seq": "of the request",
            "step": "optimizer steps taken, this one included",
            "learning_rate": "as asked for",
            "weight_decay": "as asked for",
            "grad_clip_norm": "as asked for; 0: no clipping",
            "grad_norm": "L2 norm of the gradient before clipping",
            "state_digest": "sha256 (hex) of weights, Adam moments and step count after it",
            "batch": "batch it ran in",
            "cost_us": "accelerator microseconds charged",
            "latency_us": "from the request to the result",
        },
    ),
    "audit_usage": View(
        "What was answered and what it cost, by hour, adapter and kind of request.",
        {
            "hour_us": "start of the hour, microseconds since 1970, UTC",
            "tenant": _TENANT,
            "adapter": "which adapter; NULL: the base model",
            "kind": "forward_backward, sample, ...",
            "num_requests": "answered requests, the failed ones too",
            "tokens_in": "tokens of the completed requests",
            "tokens_out": "tokens sampled",
            "accelerator_s": _COST,
        },
    ),
    "audit_costs": View(
        "The bill: all a tenant ever used.",
        {
            "tenant": _TENANT,
            "num_requests": "answered requests, the failed ones too",
            "tokens_in": "tokens of the completed requests",
            "tokens_out": "tokens sampled",
            "accelerator_s": _COST,
            "share": "of all tenants' accelerator time, 0 to 1",
        },
    ),
    "audit_stuck": View(
        "Requests without an answer.",
        {
            "id": "of the future: position of the request",
            "created_us": _AT,
            "tenant": _TENANT,
            "adapter": "which adapter; NULL: the base model",
            "seq": "place among the adapter's requests; NULL for samples",
            "kind": "forward_backward, sample, ...",
            "num_tokens": "tokens it brought",
            "waits_for": "earlier requests of its adapter that are not answered either",
        },
    ),
    "audit_batches": View(
        "What the scheduler ran together.",
        {
            "id": "epoch.number of the leader that planned it",
            "position": "of its batch.planned event",
            "lane": "train, sample or control",
            "state": "planned, ran or lost",
            "environment": "digest of the environment.recorded it ran in",
            "num_units": "units of work",
            "num_requests": "requests they belong to",
            "estimated_us": "accelerator time it was expected to take, microseconds",
            "busy_us": "accelerator time it took, microseconds",
            "planned_us": _AT,
            "done_us": _AT,
            "latency_us": "from plan to end",
        },
    ),
}
"""View -> description: the reference page is made from this."""
