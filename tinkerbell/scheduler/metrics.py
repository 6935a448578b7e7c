"""What the scheduler counts for `GET /metrics` of its process."""

from prometheus_client import Counter

RECOVERY_POINTS = Counter(
    "tinkerbell_recovery_points", "Recovery points that were written, or could not be.", ["outcome"]
)
"""outcome: written, failed."""
STORAGE_REFUSALS = Counter(
    "tinkerbell_storage_refusals", "Attempts to write a result that the blob store did not take."
)
CHORE_FAILURES = Counter(
    "tinkerbell_chore_failures", "What a leader does from time to time and did not work out.", ["chore"]
)
