"""Four users of one server, each with its own training script, and the record of how they fared."""
