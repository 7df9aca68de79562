"""What trained dictionaries say: evaluation, frontiers, clusters, findings."""
