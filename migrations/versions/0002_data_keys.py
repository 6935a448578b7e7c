"""Data keys of tenants: bodies and blobs are encrypted from here on."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import LargeBinary, Text

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "data_keys",
        C("id", LargeBinary(16), primary_key=True),
        C("tenant", Text, nullable=False, index=True),
        C("wrapped", LargeBinary, comment="AES-256-GCM under the key in the key file; NULL: destroyed"),
        C("wrapped_by", Text, nullable=False, comment="which key file"),
        C("created_us", Big, nullable=False),
        C("destroyed_us", Big),
        comment="Keys that tenants' bodies and blobs are encrypted with. No part of the log.",
    )
