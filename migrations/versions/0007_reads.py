"""Questions cost what they return: totals that are kept, and indexes in the order of every list."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import Text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")

AUDITED = (
    "type IN ('add_lora.requested', 'bulk.compacted', 'checkpoint.changed', 'checkpoint.copied', 'key.created',"
    " 'key.revoked', 'load.requested', 'remove_lora.requested', 'sampler.created', 'save.requested', 'session.ended',"
    " 'session.started', 'tenant.configured', 'tenant.erased')"
)
SAVED = "kind = 'save'"
KEPT = "kind = 'save' AND NOT deleted"
INDEXES: list[tuple[str, str, list[str], str | None]] = [
    ("ix_events_audited", "events", ["tenant", "created_us", "position"], AUDITED),
    ("ix_futures_tenant_done_us", "futures", ["tenant", "done_us"], None),
    ("ix_adapters_session", "adapters", ["session"], None),
    ("ix_adapters_tenant_created_us_id", "adapters", ["tenant", "created_us", "id"], None),
    ("ix_adapters_models", "adapters", ["tenant", "created_us", "id"], "id NOT LIKE '%:sample:%'"),
    ("ix_adapters_living", "adapters", ["tenant", "id"], "state IN ('pending', 'ready')"),
    ("ix_checkpoints_saved", "checkpoints", ["tenant", "position"], SAVED),
    ("ix_checkpoints_saved_of_adapter", "checkpoints", ["tenant", "adapter", "position"], SAVED),
    ("ix_checkpoints_named", "checkpoints", ["tenant", "adapter", "use", "name", "position"], SAVED),
    (
        "ix_checkpoints_kept",
        "checkpoints",
        ["tenant", "position", "expires_us", "use", "name", "num_bytes"],
        KEPT,
    ),
    ("ix_checkpoints_kept_of_adapter", "checkpoints", ["tenant", "adapter", "use", "position", "expires_us"], KEPT),
    ("ix_sessions_tenant_created_us_id", "sessions", ["tenant", "created_us", "id"], None),
    ("ix_sessions_open", "sessions", ["heard_us"], "ended_us IS NULL"),
    ("ix_usage_tenant_hour_us", "usage", ["tenant", "hour_us"], None),
]
"""Name, table, columns, rows that are in it."""

SESSION = "UPDATE adapters SET session = substr(id, 1, {find}(id, ':') - 1) WHERE id LIKE '%:%'"
TOTALS = """
    INSERT INTO totals (tenant, adapter, kind, num_accepted, num_failed, tokens_accepted, num_answered, tokens_in,
                        tokens_out, cost_us)
    SELECT tenant, COALESCE(adapter, ''), kind, COUNT(*),
           SUM(CASE WHEN state = 'failed' THEN 1 ELSE 0 END), SUM(num_tokens),
           SUM(CASE WHEN state = 'pending' THEN 0 ELSE 1 END),
           SUM(CASE WHEN state = 'completed' THEN num_tokens ELSE 0 END),
           SUM(tokens_out), SUM(COALESCE(cost_us, 0))
    FROM futures GROUP BY tenant, COALESCE(adapter, ''), kind"""
BILLS = """
    INSERT INTO bills (tenant, cost_us)
    SELECT tenant, SUM(cost_us) FROM futures WHERE state <> 'pending' GROUP BY tenant"""


def upgrade() -> None:
    op.create_table(
        "totals",
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
    op.create_table(
        "bills",
        C("tenant", Text, primary_key=True),
        C("cost_us", Big, nullable=False),
        comment="What a tenant's requests cost, from the beginning.",
    )
    op.execute(TOTALS)
    op.execute(BILLS)
    op.add_column("adapters", C("session", Text, comment="session that it was made in, if any"))
    op.execute(SESSION.format(find="instr" if op.get_bind().dialect.name == "sqlite" else "strpos"))
    for name, table in (
        ("ix_futures_done_us", "futures"),
        ("ix_adapters_tenant", "adapters"),
        ("ix_sessions_tenant", "sessions"),
    ):
        op.drop_index(name, table)
    for name, table, columns, where in INDEXES:
        only = None if where is None else sa.text(where)
        op.create_index(name, table, columns, sqlite_where=only, postgresql_where=only)
