"""The first schema: the log, its projections, append-only triggers, views for auditors."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    SmallInteger,
    Text,
    UniqueConstraint,
)
from sqlalchemy import Column as C  # noqa: N817 - there are 130 of them

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Hash = LargeBinary(32)
Json = sa.JSON(none_as_null=True)
TERMINAL = sa.text("type LIKE '%.completed' OR type LIKE '%.failed'")
KEYED = sa.text("idempotency_key IS NOT NULL")
PENDING = sa.text("state = 'pending'")
APPEND_ONLY = ("events", "event_blobs")

# The same text on SQLite and Postgres. `->>` gives text on one and numbers on the other: every use has a CAST.
VIEWS = {
    "audit_events": """
        SELECT position, created_us, tenant, actor, adapter, seq, type, causation, correlation, data, body_len,
               num_blobs
        FROM events""",
    "audit_optim_steps": """
        SELECT r.position, r.created_us, r.tenant, r.adapter, q.seq,
               CAST(r.data ->> 'step' AS BIGINT) AS step,
               CAST(q.data -> 'adam' ->> 'learning_rate' AS DOUBLE PRECISION) AS learning_rate,
               CAST(q.data -> 'adam' ->> 'weight_decay' AS DOUBLE PRECISION) AS weight_decay,
               CAST(q.data -> 'adam' ->> 'grad_clip_norm' AS DOUBLE PRECISION) AS grad_clip_norm,
               CAST(r.data ->> 'grad_norm' AS DOUBLE PRECISION) AS grad_norm,
               CAST(r.data ->> 'state_digest' AS TEXT) AS state_digest,
               CAST(r.data ->> 'batch' AS TEXT) AS batch,
               CAST(r.data ->> 'cost_us' AS BIGINT) AS cost_us,
               r.created_us - q.created_us AS latency_us
        FROM events r JOIN events q ON q.position = r.causation
        WHERE r.type = 'optim_step.completed'""",
    "audit_usage": """
        SELECT hour_us, tenant, NULLIF(adapter, '') AS adapter, kind, num_requests, tokens_in, tokens_out,
               CAST(cost_us AS DOUBLE PRECISION) / 1000000 AS accelerator_s
        FROM usage""",
    "audit_costs": """
        SELECT tenant,
               CAST(SUM(num_requests) AS BIGINT) AS num_requests,
               CAST(SUM(tokens_in) AS BIGINT) AS tokens_in,
               CAST(SUM(tokens_out) AS BIGINT) AS tokens_out,
               CAST(SUM(cost_us) AS DOUBLE PRECISION) / 1000000 AS accelerator_s,
               CAST(SUM(cost_us) AS DOUBLE PRECISION) / NULLIF((SELECT SUM(cost_us) FROM usage), 0) AS share
        FROM usage GROUP BY tenant""",
    "audit_stuck": """
        SELECT f.id, f.created_us, f.tenant, f.adapter, f.seq, f.kind, f.num_tokens,
               f.seq - a.done_seq - 1 AS waits_for
        FROM futures f LEFT JOIN adapters a ON a.id = f.adapter
        WHERE f.state = 'pending'""",
    "audit_batches": """
        SELECT id, position, lane, state, environment, num_units, num_requests, estimated_us, busy_us,
               planned_us, done_us, done_us - planned_us AS latency_us
        FROM batches""",
}


UNIQUE_KEYS = {
    "events": (
        "position = NEW.position",
        "stream = NEW.stream AND stream_version = NEW.stream_version",
        "tenant = NEW.tenant AND idempotency_key = NEW.idempotency_key",
        "(NEW.type LIKE '%.completed' OR NEW.type LIKE '%.failed') AND causation = NEW.causation"
        " AND (type LIKE '%.completed' OR type LIKE '%.failed')",
    ),
    "event_blobs": ("position = NEW.position AND name = NEW.name",),
}
"""Table -> what makes a new row collide with one that is there, each by an index."""


def upgrade() -> None:
    _log_tables()
    _projection_tables()
    op.execute("INSERT INTO log_head (id, position) VALUES (1, 0)")
    for name, query in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {query}")
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION tinkerbell_append_only() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        for table in APPEND_ONLY:
            op.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}"
                " FOR EACH ROW EXECUTE FUNCTION tinkerbell_append_only()"
            )
            op.execute(
                f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION tinkerbell_append_only()"
            )
    else:
        for table in APPEND_ONLY:
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table}"
                    f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        # INSERT OR REPLACE deletes rows that are in its way without asking the triggers above.
        for table, keys in UNIQUE_KEYS.items():
            taken = " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE {key})" for key in keys)
            op.execute(
                f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {taken}"
                f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )


def _log_tables() -> None:
    op.create_table(
        "log_head",
        C(
            "id",
            SmallInteger,
            CheckConstraint("id = 1", name="one_row"),
            primary_key=True,
            autoincrement=False,
        ),
        C("position", Big, nullable=False),
        comment="The last position given out; its row lock is the append lock.",
    )
    op.create_table(
        "streams",
        C("stream", Text, primary_key=True),
        C("tenant", Text, nullable=False),
        C("version", Big, nullable=False),
        C("head_hash", Hash, nullable=False),
        comment="Last version and hash of every stream.",
    )
    op.create_table(
        "events",
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
        C("body", LargeBinary, comment="arrays; NULL with a body_hash: the blob named body"),
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
        Index(
            "uq_events_idempotency_key",
            "tenant",
            "idempotency_key",
            unique=True,
            sqlite_where=KEYED,
            postgresql_where=KEYED,
        ),
        Index(
            "uq_events_terminal",
            "causation",
            unique=True,
            sqlite_where=TERMINAL,
            postgresql_where=TERMINAL,
        ),
        comment="The log. Append-only: triggers refuse UPDATE and DELETE.",
    )
    op.create_table(
        "blobs",
        C("hash", Hash, primary_key=True),
        C("length", Big, nullable=False, comment="bytes"),
        C("location", Text, nullable=False, comment="file: the blob directory of the server"),
        C("created_us", Big, nullable=False),
        comment="Blobs that events name; each was durable before the event.",
    )
    op.create_table(
        "event_blobs",
        C("position", Big, ForeignKey("events.position"), primary_key=True, autoincrement=False),
        C("name", Text, primary_key=True),
        C("blob_hash", Hash, ForeignKey("blobs.hash"), nullable=False, index=True),
        comment="Which blobs an event names. Append-only like the log.",
    )


def _projection_tables() -> None:
    op.create_table(
        "futures",
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
        C("result_position", Big),
        C("cost_us", Big, comment="accelerator microseconds charged"),
        C("created_us", Big, nullable=False),
        C("done_us", Big),
        UniqueConstraint("adapter", "seq"),
        Index("ix_futures_pending", "tenant", "id", sqlite_where=PENDING, postgresql_where=PENDING),
        Index(None, "done_us"),
        Index(None, "adapter", "id"),
        comment="Every request and its answer.",
    )
    op.create_table(
        "adapters",
        C("id", Text, primary_key=True),
        C("tenant", Text, nullable=False, index=True),
        C("name", Text),
        C("base_model", Text, nullable=False),
        C("lora", Json, nullable=False),
        C("seed", Big, nullable=False),
        C("checkpoint", Text, comment="checkpoint it started from"),
        C("with_optimizer", Boolean, nullable=False),
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
        comment="Every adapter there ever was.",
    )
    op.create_table(
        "checkpoints",
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
        Index(None, "adapter", "after_seq"),
        Index(None, "tenant", "position"),
        comment="Saved adapters: by their users, and the server's own recovery points.",
    )
    op.create_table(
        "usage",
        C("hour_us", Big, primary_key=True, autoincrement=False, comment="start of the hour"),
        C("tenant", Text, primary_key=True),
        C("adapter", Text, primary_key=True, comment="empty: the base model"),
        C("kind", Text, primary_key=True),
        C("num_requests", Big, nullable=False),
        C("tokens_in", Big, nullable=False),
        C("tokens_out", Big, nullable=False),
        C("cost_us", Big, nullable=False),
        comment="What was answered and what it cost, by the hour.",
    )
    op.create_table(
        "leases",
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
    op.create_table(
        "tenants",
        C("tenant", Text, primary_key=True),
        C("weight", Double, nullable=False),
        C("max_pending_requests", Big),
        C("max_pending_tokens", Big),
        C("max_adapters", Big),
        comment="Shares and limits that were set; NULL is the server's default.",
    )
    op.create_table(
        "api_keys",
        C("key_id", Text, primary_key=True),
        C("tenant", Text, nullable=False, index=True),
        C("key_hash", Text, nullable=False, comment="sha256 (hex) of the secret"),
        C("admin", Boolean, nullable=False),
        C("note", Text, nullable=False),
        C("created_us", Big, nullable=False),
        C("revoked_us", Big),
        comment="API keys.",
    )
    op.create_table(
        "environments",
        C("position", Big, primary_key=True, autoincrement=False),
        C("digest", Text, nullable=False, index=True),
        C("executor", Text, nullable=False),
        C("model", Text, nullable=False),
        C("exact", Boolean, nullable=False),
        C("created_us", Big, nullable=False),
        comment="Where batches ran.",
    )
    op.create_table(
        "batches",
        C("id", Text, primary_key=True, comment="epoch.number of the leader that planned it"),
        C("lane", Text, nullable=False),
        C("environment", Text, nullable=False),
        C(
            "state",
            Text,
            CheckConstraint("state IN ('planned', 'ran', 'lost')", name="state"),
            nullable=False,
        ),
        C("num_units", Big, nullable=False),
        C("num_requests", Big, nullable=False),
        C("estimated_us", Big, nullable=False),
        C("busy_us", Big),
        C("planned_us", Big, nullable=False),
        C("done_us", Big),
        C("position", Big, nullable=False),
        comment="What ran together.",
    )
