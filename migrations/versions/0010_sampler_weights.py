"""Which weights of samplers without a name are there: found without reading all checkpoints that ever were."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

SAMPLER_WEIGHTS = "use = 'sampler' AND name IS NULL AND NOT deleted"


def upgrade() -> None:
    where = {"sqlite_where": sa.text(SAMPLER_WEIGHTS), "postgresql_where": sa.text(SAMPLER_WEIGHTS)}
    op.create_index("ix_checkpoints_sampler_weights", "checkpoints", ["position"], **where)
    op.create_index("ix_samplers_checkpoint", "samplers", ["checkpoint"])
