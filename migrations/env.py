"""Runs the migrations on the connection that `tinkerbell.events.schema.upgrade` hands over, in its transaction."""

from alembic import context

from tinkerbell.events.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, compare_type=True)
context.run_migrations()
