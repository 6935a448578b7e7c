"""When a session's program last said that it runs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column(
        "sessions",
        C("heard_us", Big, nullable=False, server_default="0", comment="when its program last said that it runs"),
    )
    op.execute("UPDATE sessions SET heard_us = created_us")
