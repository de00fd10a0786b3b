"""From shards to batches of crops."""
