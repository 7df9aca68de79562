"""An architecture-blind training loop with exact resume."""
