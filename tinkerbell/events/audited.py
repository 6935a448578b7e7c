"""Which events are a tenant's audit log, without those that carry its data: they have an index by time."""

AUDITED_TYPES = (
    *("add_lora.requested", "bulk.compacted", "checkpoint.changed", "checkpoint.copied", "key.created", "key.revoked"),
    *("load.requested", "remove_lora.requested", "sampler.created", "save.requested", "session.ended"),
    *("session.started", "tenant.configured", "tenant.erased"),
)
"""Events that carry no data: who did what. To name more of them is to make the index anew."""
AUDITED = f"type IN ({', '.join(repr(each) for each in AUDITED_TYPES)})"
