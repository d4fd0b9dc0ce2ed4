"""Converters of public checkpoints into this project's, for the ``convert_*.py`` scripts; not installed."""
