"""Models: checkpoints in, model folders out. Importing this loads no third-party package."""
