"""Which base model's weights an adapter was made for."""

from alembic import op
from sqlalchemy import Column as C  # noqa: N817 - as in tables.py
from sqlalchemy import Text

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "adapters", C("base_hash", Text, comment="names the base model's weights; NULL: made by an older release")
    )
