"""Tables of the database, the same on SQLite and Postgres: the log, and the projections folded from it.

Times are microseconds since 1970 (UTC). A JSON column holds canonical JSON text, verbatim (Postgres `json`, never
`jsonb`, which reorders keys): the log's hashes are taken over that text. Triggers and views are in `migrations/`.
"""

import sqlalchemy as sa
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    SmallInteger,
    Text,
    UniqueConstraint,
)
from sqlalchemy import Column as C  # noqa: N817 - there are 130 of them

from tinkerbell.events.audited import AUDITED
from tinkerbell.events.ddl import RawBytes, partial_index

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Hash = RawBytes(32)
Json = sa.JSON(none_as_null=True)

TERMINAL = "type LIKE '%.completed' OR type LIKE '%.failed'"
"""SQL of `is the answer to a request`."""
KEYED = "idempotency_key IS NOT NULL"
PENDING = "state = 'pending'"
LIVING = "state IN ('pending', 'ready')"
MODELS = "id NOT LIKE '%:sample:%'"
"""Adapters that are no sampler's."""
SAVED = "kind = 'save'"
KEPT = "kind = 'save' AND NOT deleted"
RECOVERY_POINT = "kind = 'recovery' AND NOT deleted"
SAMPLER_WEIGHTS = "use = 'sampler' AND name IS NULL AND NOT deleted"
OPEN = "ended_us IS NULL"

# ---- the log: the only truth --------------------------------------------------------------------------------------

log_head = sa.Table(
    "log_head",
    metadata,
    C("id", SmallInteger, CheckConstraint("id = 1", name="one_row"), primary_key=True, autoincrement=False),
    C("position", Big, nullable=False),
    comment="The last position given out; its row lock is the append lock.",
)
streams = sa.Table(
    "streams",
    metadata,
    C("stream", Text, primary_key=True),
    C("tenant", Text, nullable=False),
    C("version", Big, nullable=False),
    C("head_hash", Hash, nullable=False),
    comment="Last version and hash of every stream.",
)
events = sa.Table(
    "events",
    metadata,
    C(
        "position",
        Big,
        primary_key=True,
        autoincrement=False,
        comment="1, 2, 3, ... without gaps, in commit order",
    ),
    C("stream", Text, nullable=False),
    C("stream_version", Big, nullable=False),
    C("type", Text, nullable=False),
    C("schema_version", SmallInteger, nullable=False),
    C("tenant", Text, nullable=False),
    C("adapter", Text),
    C("seq", Big, comment="place of a request among its adapter's requests"),
    C("causation", Big, comment="position of the request this answers"),
    C("correlation", Text, comment="trace id of the HTTP request"),
    C("actor", Text, comment="API key or scheduler that did it"),
    C("idempotency_key", Text),
    C("request_hash", Hash, comment="sha256 of the request as the caller meant it"),
    C("data", Json, nullable=False, comment="the event, canonical JSON"),
    C("body", RawBytes, comment="arrays; NULL with a body_hash: the blob named body"),
    C("body_codec", Text, comment="zstd (of msgpack) or msgpack"),
    C("body_hash", Hash, comment="sha256 of the stored bytes"),
    C("body_len", Big, comment="bytes before compression"),
    C("num_blobs", SmallInteger, nullable=False),
    C("fence_resource", Text, comment="lease that had to hold at commit"),
    C("fence_epoch", Big),
    C("created_us", Big, nullable=False),
    C("prev_hash", Hash, nullable=False),
    C("hash", Hash, nullable=False),
    UniqueConstraint("stream", "stream_version"),
    Index(None, "tenant", "position"),
    Index(None, "adapter", "position"),
    partial_index("ix_events_audited", "tenant", "created_us", "position", where=AUDITED),
    Index(
        "uq_events_idempotency_key",
        "tenant",
        "idempotency_key",
        unique=True,
        sqlite_where=sa.text(KEYED),
        postgresql_where=sa.text(KEYED),
    ),
    Index(
        "uq_events_terminal",
        "causation",
        unique=True,
        sqlite_where=sa.text(TERMINAL),
        postgresql_where=sa.text(TERMINAL),
    ),
    comment="The log. Append-only: triggers refuse UPDATE and DELETE.",
)
blobs = sa.Table(
    "blobs",
    metadata,
    C("hash", Hash, primary_key=True),
    C("length", Big, nullable=False, comment="bytes"),
    C("location", Text, nullable=False, comment="file: the blob directory of the server"),
    C("created_us", Big, nullable=False),
    comment="Blobs that events name; each was durable before the event.",
)
event_blobs = sa.Table(
    "event_blobs",
    metadata,
    C("position", Big, ForeignKey("events.position"), primary_key=True, autoincrement=False),
    C("name", Text, primary_key=True),
    C("blob_hash", Hash, ForeignKey("blobs.hash"), nullable=False, index=True),
    comment="Which blobs an event names. Append-only like the log.",
)

# ---- who wrote the log: checked by `tinkerbell audit verify` -------------------------------------------------------

commit_macs = sa.Table(
    "commit_macs",
    metadata,
    C("position", Big, primary_key=True, autoincrement=False, comment="of the last event of the transaction"),
    C("first", Big, nullable=False, comment="position of its first event"),
    C("mac", Hash, nullable=False, comment="HMAC of their hashes under the key in the key file"),
    comment="What only who has the key file can write. No part of the log.",
)

# ---- keys: no part of the log, so that one can be destroyed ----------------------------------------------------------

data_keys = sa.Table(
    "data_keys",
    metadata,
    C("id", RawBytes(16), primary_key=True),
    C("tenant", Text, nullable=False, index=True),
    C("wrapped", RawBytes, comment="AES-256-GCM under the key in the key file; NULL: destroyed"),
    C("wrapped_by", Text, nullable=False, comment="which key file"),
    C("created_us", Big, nullable=False),
    C("destroyed_us", Big),
    comment="Keys that tenants' bodies and blobs are encrypted with. No part of the log.",
)

# ---- projections: folds of the log, written in the append transaction -----------------------------------------------

futures = sa.Table(
    "futures",
    metadata,
    C("id", Big, primary_key=True, autoincrement=False, comment="position of the request"),
    C("tenant", Text, nullable=False),
    C("adapter", Text),
    C("seq", Big),
    C("kind", Text, nullable=False),
    C(
        "state",
        Text,
        CheckConstraint("state IN ('pending', 'completed', 'failed')", name="state"),
        nullable=False,
    ),
    C("num_tokens", Big, nullable=False, comment="tokens the request brings"),
    C("tokens_out", Big, nullable=False, comment="tokens sampled for it"),
    C("reserved_tokens", Big, nullable=False, server_default="0", comment="it may come to, until it is answered"),
    C("result_position", Big),
    C("cost_us", Big, comment="accelerator microseconds charged"),
    C("created_us", Big, nullable=False),
    C("done_us", Big),
    UniqueConstraint("adapter", "seq"),
    partial_index("ix_futures_pending", "tenant", "id", where=PENDING),
    Index(None, "tenant", "done_us"),
    Index(None, "adapter", "id"),
    comment="Every request and its answer.",
)
adapters = sa.Table(
    "adapters",
    metadata,
    C("id", Text, primary_key=True),
    C("tenant", Text, nullable=False),
    C("session", Text, index=True, comment="session that it was made in, if any"),
    C("name", Text),
    C("base_model", Text, nullable=False),
    C("base_hash", Text, comment="names the base model's weights; NULL: made by an older release"),
    C("lora", Json, nullable=False),
    C("seed", Big, nullable=False),
    C("checkpoint", Text, comment="checkpoint it started from"),
    C("with_optimizer", Boolean, nullable=False),
    C("user_metadata", Json),
    C(
        "state",
        Text,
        CheckConstraint("state IN ('pending', 'ready', 'failed', 'removed')", name="state"),
        nullable=False,
    ),
    C("num_parameters", Big),
    C("step", Big, nullable=False, comment="optimizer steps taken"),
    C("next_seq", Big, nullable=False, comment="seq of the next request"),
    C("done_seq", Big, nullable=False, comment="every request up to it is answered; -1: none"),
    C("last_loss", Double, comment="per token, of the newest forward_backward"),
    C("state_digest", Text),
    C("created_us", Big, nullable=False),
    Index(None, "tenant", "created_us", "id"),
    partial_index("ix_adapters_models", "tenant", "created_us", "id", where=MODELS),
    partial_index("ix_adapters_living", "tenant", "id", where=LIVING),
    comment="Every adapter there ever was.",
)
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    C("id", Text, primary_key=True),
    C("tenant", Text, nullable=False),
    C("adapter", Text, nullable=False),
    C("kind", Text, CheckConstraint("kind IN ('save', 'recovery')", name="kind"), nullable=False),
    C("name", Text),
    C("after_seq", Big, nullable=False, comment="it holds the effect of the requests up to this one"),
    C("step", Big, nullable=False),
    C("lora", Json, nullable=False),
    C("num_bytes", Big, nullable=False),
    C("state_digest", Text, nullable=False),
    C("blobs", Json, nullable=False, comment="name -> hash (hex)"),
    C("position", Big, nullable=False),
    C("created_us", Big, nullable=False),
    C("use", Text, nullable=False, server_default="state", comment="state, sampler or external"),
    C("user_metadata", Json),
    C("expires_us", Big, comment="nobody can use it from then on; NULL: never"),
    C("published", Boolean, nullable=False, server_default=sa.false()),
    C("deleted", Boolean, nullable=False, server_default=sa.false()),
    Index(None, "adapter", "after_seq"),
    Index(None, "tenant", "position"),
    partial_index("ix_checkpoints_saved", "tenant", "position", where=SAVED),
    partial_index("ix_checkpoints_saved_of_adapter", "tenant", "adapter", "position", where=SAVED),
    partial_index("ix_checkpoints_named", "tenant", "adapter", "use", "name", "position", where=SAVED),
    # With what is counted and summed.
    partial_index("ix_checkpoints_kept", "tenant", "position", "expires_us", "use", "name", "num_bytes", where=KEPT),
    partial_index("ix_checkpoints_kept_of_adapter", "tenant", "adapter", "use", "position", "expires_us", where=KEPT),
    partial_index("ix_checkpoints_recovery", "adapter", where=RECOVERY_POINT),
    partial_index("ix_checkpoints_sampler_weights", "position", where=SAMPLER_WEIGHTS),
    comment="Saved adapters: by their users, and the server's own recovery points.",
)
sessions = sa.Table(
    "sessions",
    metadata,
    C("id", Text, primary_key=True),
    C("tenant", Text, nullable=False),
    C("client", Text, nullable=False, comment="library that asked, with its version"),
    C("display_name", Text),
    C("tags", Json),
    C("user_metadata", Json),
    C("created_us", Big, nullable=False),
    C("heard_us", Big, nullable=False, server_default="0", comment="when its program last said that it runs"),
    C("ended_us", Big),
    Index(None, "tenant", "created_us", "id"),
    partial_index("ix_sessions_open", "heard_us", where=OPEN),
    partial_index("ix_sessions_open_of_tenant", "tenant", where=OPEN),
    comment="Programs of tenants; ids of what they made begin with the session's.",
)
samplers = sa.Table(
    "samplers",
    metadata,
    C("id", Text, primary_key=True),
    C("tenant", Text, nullable=False, index=True),
    C("session", Text, nullable=False, index=True),
    C("checkpoint", Text, index=True, comment="NULL: the base model"),
    C("created_us", Big, nullable=False),
    comment="Weights to sample from that nothing changes.",
)
usage = sa.Table(
    "usage",
    metadata,
    C("hour_us", Big, primary_key=True, autoincrement=False, comment="start of the hour"),
    C("tenant", Text, primary_key=True),
    C("adapter", Text, primary_key=True, comment="empty: the base model"),
    C("kind", Text, primary_key=True),
    C("num_requests", Big, nullable=False),
    C("tokens_in", Big, nullable=False),
    C("tokens_out", Big, nullable=False),
    C("cost_us", Big, nullable=False),
    Index(None, "tenant", "hour_us"),
    comment="What was answered and what it cost, by the hour.",
)
totals = sa.Table(
    "totals",
    metadata,
    C("tenant", Text, primary_key=True),
    C("adapter", Text, primary_key=True, comment="empty: the base model"),
    C("kind", Text, primary_key=True),
    C("num_accepted", Big, nullable=False, comment="requests"),
    C("num_failed", Big, nullable=False),
    C("tokens_accepted", Big, nullable=False, comment="tokens of all of them"),
    C("num_answered", Big, nullable=False, comment="of the requests, the failed ones too"),
    C("tokens_in", Big, nullable=False, comment="tokens of the completed ones"),
    C("tokens_out", Big, nullable=False, comment="tokens sampled"),
    C("cost_us", Big, nullable=False),
    comment="What was asked of each adapter, and what it cost, from the beginning.",
)
bills = sa.Table(
    "bills",
    metadata,
    C("tenant", Text, primary_key=True),
    C("cost_us", Big, nullable=False),
    comment="What a tenant's requests cost, from the beginning.",
)
leases = sa.Table(
    "leases",
    metadata,
    C("resource", Text, primary_key=True),
    C("holder", Text, nullable=False),
    C("epoch", Big, nullable=False, comment="fencing token; it only grows"),
    C(
        "expires_us",
        Big,
        nullable=False,
        server_default="0",
        comment="moved by heartbeats, which are not events",
    ),
    comment="Who leads.",
)
tenants = sa.Table(
    "tenants",
    metadata,
    C("tenant", Text, primary_key=True),
    C("weight", Double, nullable=False),
    C("max_pending_requests", Big),
    C("max_pending_tokens", Big),
    C("max_adapters", Big),
    C("max_adapter_bytes", Big),
    C("max_sessions", Big),
    C("max_samplers", Big),
    C("max_checkpoints", Big),
    C("max_stored_bytes", Big),
    comment="Shares and limits that were set; NULL is the server's default.",
)
lines = sa.Table(
    "lines",
    metadata,
    C("tenant", Text, primary_key=True),
    C("num_requests", Big, nullable=False),
    C("num_tokens", Big, nullable=False, comment="those that may be sampled included"),
    comment="What waits of each tenant.",
)
stored = sa.Table(
    "stored",
    metadata,
    C("tenant", Text, primary_key=True),
    C("num_bytes", Big, nullable=False, comment="of its events, their bodies and blobs"),
    comment="What is kept of each tenant. No fold of the log: bytes are as they are stored.",
)
api_keys = sa.Table(
    "api_keys",
    metadata,
    C("key_id", Text, primary_key=True),
    C("tenant", Text, nullable=False, index=True),
    C("key_hash", Text, nullable=False, comment="sha256 (hex) of the secret"),
    C("admin", Boolean, nullable=False),
    C("note", Text, nullable=False),
    C("created_us", Big, nullable=False),
    C("revoked_us", Big),
    comment="API keys.",
)
environments = sa.Table(
    "environments",
    metadata,
    C("position", Big, primary_key=True, autoincrement=False),
    C("digest", Text, nullable=False, index=True),
    C("executor", Text, nullable=False),
    C("model", Text, nullable=False),
    C("exact", Boolean, nullable=False),
    C("created_us", Big, nullable=False),
    comment="Where batches ran.",
)
batches = sa.Table(
    "batches",
    metadata,
    C("id", Text, primary_key=True, comment="epoch.number of the leader that planned it"),
    C("lane", Text, nullable=False),
    C("environment", Text, nullable=False),
    C("state", Text, CheckConstraint("state IN ('planned', 'ran', 'lost')", name="state"), nullable=False),
    C("num_units", Big, nullable=False),
    C("num_requests", Big, nullable=False),
    C("estimated_us", Big, nullable=False),
    C("busy_us", Big),
    C("planned_us", Big, nullable=False),
    C("done_us", Big),
    C("position", Big, nullable=False),
    comment="What ran together.",
)
erasures = sa.Table(
    "erasures",
    metadata,
    C("tenant", Text, primary_key=True),
    C("position", Big, nullable=False, comment="of its newest tenant.erased"),
    comment="Tenants that were erased: bodies and blobs of their earlier events are gone.",
)
removed_bulk = sa.Table(
    "removed_bulk",
    metadata,
    C("position", Big, primary_key=True, autoincrement=False, comment="of the event whose body and blobs are gone"),
    C("removed_by", Big, nullable=False, comment="position of the bulk.compacted"),
    comment="What was compacted.",
)

PROJECTIONS: dict[str, sa.Table] = {
    table.name: table
    for table in (
        *(futures, adapters, checkpoints, usage, leases, tenants, api_keys, environments, batches),
        *(erasures, removed_bulk, sessions, samplers, totals, bills, lines),
    )
}
"""Tables that can be rebuilt from the log."""
