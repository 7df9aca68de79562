"""From a base model and a corpus to batches of named activations."""
