"""From numbers to pages and figures; computes nothing."""
