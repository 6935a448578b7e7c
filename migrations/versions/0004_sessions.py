"""Sessions and samplers; what a checkpoint is for, how long it is kept; metadata of users."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Boolean, Text
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
Json = sa.JSON(none_as_null=True)


def upgrade() -> None:
    op.add_column("adapters", C("user_metadata", Json))
    for column in (
        C("use", Text, nullable=False, server_default="state", comment="state, sampler or external"),
        C("user_metadata", Json),
        C("expires_us", Big, comment="nobody can use it from then on; NULL: never"),
        C("published", Boolean, nullable=False, server_default=sa.false()),
        C("deleted", Boolean, nullable=False, server_default=sa.false()),
    ):
        op.add_column("checkpoints", column)
    op.create_table(
        "sessions",
        C("id", Text, primary_key=True),
        C("tenant", Text, nullable=False),
        C("client", Text, nullable=False, comment="library that asked, with its version"),
        C("display_name", Text),
        C("tags", Json),
        C("user_metadata", Json),
        C("created_us", Big, nullable=False),
        C("ended_us", Big),
        comment="Programs of tenants; ids of what they made begin with the session's.",
    )
    op.create_index("ix_sessions_tenant", "sessions", ["tenant"])
    op.create_table(
        "samplers",
        C("id", Text, primary_key=True),
        C("tenant", Text, nullable=False),
        C("session", Text, nullable=False),
        C("checkpoint", Text, comment="NULL: the base model"),
        C("created_us", Big, nullable=False),
        comment="Weights to sample from that nothing changes.",
    )
    op.create_index("ix_samplers_tenant", "samplers", ["tenant"])
    op.create_index("ix_samplers_session", "samplers", ["session"])
