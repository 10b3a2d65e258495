"""Events know the transaction that wrote them: readers walk them in an order that no late COMMIT can undercut."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # earlier rows get the number of this migration's transaction, and go on being ordered by their ids
    xid = sa.Column("xid", sa.BigInteger(), server_default=sa.text("(pg_current_xact_id()::text)::bigint"), nullable=False)
    op.add_column("events", xid)
    op.drop_index("ix_events_job_id_id", table_name="events")
    op.drop_index("ix_events_run_id_id", table_name="events")
    op.create_index("ix_events_job_id_xid_id", "events", ["job_id", "xid", "id"], unique=False)
    op.create_index("ix_events_run_id_xid_id", "events", ["run_id", "xid", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_events_run_id_xid_id", table_name="events")
    op.drop_index("ix_events_job_id_xid_id", table_name="events")
    op.create_index("ix_events_run_id_id", "events", ["run_id", "id"], unique=False)
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"], unique=False)
    op.drop_column("events", "xid")
