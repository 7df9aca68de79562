"""Sparse dictionaries over attention activations: one architecture, one file."""
