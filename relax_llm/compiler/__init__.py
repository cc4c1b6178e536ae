"""From a checkpoint and an architecture to an artifact."""
