"""Models of where attention heads attend, and of what may replace them."""
