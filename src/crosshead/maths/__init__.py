"""Pure tensor functions; nothing here knows of a model, a file or a run."""
