"""Every transaction of the log is authenticated with the key in the key file, from here on."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import LargeBinary

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "commit_macs",
        C("position", Big, primary_key=True, autoincrement=False, comment="of the last event of the transaction"),
        C("first", Big, nullable=False, comment="position of its first event"),
        C("mac", LargeBinary(32), nullable=False, comment="HMAC of their hashes under the key in the key file"),
        comment="What only who has the key file can write. No part of the log.",
    )
    if op.get_bind().dialect.name == "postgresql":
        # ANALYZE keeps samples of small values: what is to be destroyed must not be among them.
        op.execute("ALTER TABLE data_keys ALTER COLUMN wrapped SET STATISTICS 0")
        op.execute("ALTER TABLE events ALTER COLUMN body SET STATISTICS 0")
        op.execute(
            "CREATE TRIGGER commit_macs_append_only BEFORE UPDATE OR DELETE ON commit_macs"
            " FOR EACH ROW EXECUTE FUNCTION tinkerbell_append_only()"
        )
        op.execute(
            "CREATE TRIGGER commit_macs_no_truncate BEFORE TRUNCATE ON commit_macs"
            " FOR EACH STATEMENT EXECUTE FUNCTION tinkerbell_append_only()"
        )
        return
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER commit_macs_no_{verb.lower()} BEFORE {verb} ON commit_macs"
            " BEGIN SELECT RAISE(ABORT, 'commit_macs is append-only'); END"
        )
    op.execute(
        "CREATE TRIGGER commit_macs_not_replaced BEFORE INSERT ON commit_macs"
        " WHEN EXISTS (SELECT 1 FROM commit_macs WHERE position = NEW.position)"
        " BEGIN SELECT RAISE(ABORT, 'commit_macs is append-only'); END"
    )
