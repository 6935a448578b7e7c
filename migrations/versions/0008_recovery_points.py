"""Which recovery points are there: found without reading all that ever were."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

LIVING = "kind = 'recovery' AND NOT deleted"


def upgrade() -> None:
    where = {"sqlite_where": sa.text(LIVING), "postgresql_where": sa.text(LIVING)}
    op.create_index("ix_checkpoints_recovery", "checkpoints", ["adapter"], **where)
