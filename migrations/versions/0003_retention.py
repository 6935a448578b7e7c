"""Erasing tenants and compacting bulk: what may leave the log, and a trigger that lets nothing else go."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import Text

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")

KEPT = (
    "position", "stream", "stream_version", "type", "schema_version", "tenant", "adapter", "seq", "causation",
    "correlation", "actor", "idempotency_key", "request_hash", "data", "body_codec", "body_hash", "body_len",
    "num_blobs", "fence_resource", "fence_epoch", "created_us", "prev_hash", "hash",
)  # fmt: skip
"""Every column of `events` but the body."""

REMOVED = """(
    EXISTS (SELECT 1 FROM erasures e JOIN events x ON x.position = e.position
            WHERE e.tenant = OLD.tenant AND e.position > OLD.position
              AND x.tenant = OLD.tenant AND x.type = 'tenant.erased')
    OR EXISTS (SELECT 1 FROM removed_bulk r JOIN events x ON x.position = r.removed_by
               WHERE r.position = OLD.position AND x.tenant = OLD.tenant AND x.type = 'bulk.compacted'))"""
"""An event of the log says that this one's body may go."""


def upgrade() -> None:
    op.create_table(
        "erasures",
        C("tenant", Text, primary_key=True),
        C("position", Big, nullable=False, comment="of its newest tenant.erased"),
        comment="Tenants that were erased: bodies and blobs of their earlier events are gone.",
    )
    op.create_table(
        "removed_bulk",
        C("position", Big, primary_key=True, autoincrement=False, comment="of the event whose body and blobs are gone"),
        C("removed_by", Big, nullable=False, comment="position of the bulk.compacted"),
        comment="What was compacted.",
    )
    if op.get_bind().dialect.name == "postgresql":
        # json has no equality; its text is what the hash is over.
        same = " AND ".join(
            "NEW.data::text = OLD.data::text" if name == "data" else f"NEW.{name} IS NOT DISTINCT FROM OLD.{name}"
            for name in KEPT
        )
        op.execute(
            "CREATE FUNCTION tinkerbell_only_bodies_leave() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN IF NEW.body IS NULL AND {same} AND {REMOVED} THEN RETURN NEW; END IF;"
            " RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        op.execute("DROP TRIGGER events_append_only ON events")
        op.execute(
            "CREATE TRIGGER events_append_only BEFORE DELETE ON events"
            " FOR EACH ROW EXECUTE FUNCTION tinkerbell_append_only()"
        )
        op.execute(
            "CREATE TRIGGER events_only_bodies_leave BEFORE UPDATE ON events"
            " FOR EACH ROW EXECUTE FUNCTION tinkerbell_only_bodies_leave()"
        )
    else:
        same = " AND ".join(f"NEW.{name} IS OLD.{name}" for name in KEPT)
        op.execute("DROP TRIGGER events_no_update")
        op.execute(
            f"CREATE TRIGGER events_no_update BEFORE UPDATE ON events WHEN NOT (NEW.body IS NULL AND {same}"
            f" AND {REMOVED}) BEGIN SELECT RAISE(ABORT, 'events is append-only'); END"
        )
