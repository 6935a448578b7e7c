"""Quotas: what each tenant has waiting and stored, and limits of its own for more of it."""

import msgspec
import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import Text

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")

LIMITS = ("max_adapter_bytes", "max_sessions", "max_samplers", "max_checkpoints", "max_stored_bytes")

GONE = """(EXISTS (SELECT 1 FROM erasures x WHERE x.tenant = e.tenant AND x.position > e.position)
    OR EXISTS (SELECT 1 FROM removed_bulk r WHERE r.position = e.position))"""


class _Params(msgspec.Struct, frozen=True):
    max_tokens: int = 64
    num_samples: int = 1


class _Sample(msgspec.Struct, frozen=True):
    """What is needed of a sample.requested."""

    params: _Params = _Params()


def upgrade() -> None:
    for name in LIMITS:
        op.add_column("tenants", C(name, Big))
    op.add_column(
        "futures",
        C("reserved_tokens", Big, nullable=False, server_default="0", comment="it may come to, until it is answered"),
    )
    op.create_table(
        "lines",
        C("tenant", Text, primary_key=True),
        C("num_requests", Big, nullable=False),
        C("num_tokens", Big, nullable=False, comment="those that may be sampled included"),
        comment="What waits of each tenant.",
    )
    op.create_table(
        "stored",
        C("tenant", Text, primary_key=True),
        C("num_bytes", Big, nullable=False, comment="of its events, their bodies and blobs"),
        comment="What is kept of each tenant. No fold of the log: bytes are as they are stored.",
    )
    opened = "ended_us IS NULL"
    op.create_index(
        "ix_sessions_open_of_tenant",
        "sessions",
        ["tenant"],
        sqlite_where=sa.text(opened),
        postgresql_where=sa.text(opened),
    )
    _fill()


def _fill() -> None:
    connection = op.get_bind()
    op.execute("UPDATE futures SET reserved_tokens = num_tokens WHERE state = 'pending'")
    samples = connection.execute(
        sa.text(
            "SELECT f.id, CAST(e.data AS TEXT) FROM futures f JOIN events e ON e.position = f.id"
            " WHERE f.state = 'pending' AND f.kind = 'sample'"
        )
    ).all()
    for position, data in samples:
        params = msgspec.json.decode(data, type=_Sample).params
        connection.execute(
            sa.text("UPDATE futures SET reserved_tokens = num_tokens + :more WHERE id = :id"),
            {"id": position, "more": params.max_tokens * params.num_samples},
        )
    # A row for whoever ever asked for something: what a fold of the log gives.
    op.execute(
        "INSERT INTO lines (tenant, num_requests, num_tokens)"
        " SELECT tenant, sum(CASE WHEN state = 'pending' THEN 1 ELSE 0 END), sum(reserved_tokens)"
        " FROM futures GROUP BY tenant"
    )
    op.execute(
        "INSERT INTO stored (tenant, num_bytes)"
        " SELECT e.tenant, sum(512 + length(CAST(e.data AS TEXT))"
        f" + CASE WHEN e.body IS NULL OR {GONE} THEN 0 ELSE length(e.body) END)"
        " FROM events e WHERE e.tenant <> 'system' GROUP BY e.tenant"
    )
    op.execute(
        "UPDATE stored SET num_bytes = num_bytes + coalesce((SELECT sum(b.length) FROM events e"
        " JOIN event_blobs n ON n.position = e.position JOIN blobs b ON b.hash = n.blob_hash"
        f" WHERE e.tenant = stored.tenant AND NOT {GONE}), 0)"
    )
