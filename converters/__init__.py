"""Converters of public checkpoints (Hugging Face, fairseq, Microsoft) into this project's checkpoint files.

They are used by the ``convert_*.py`` scripts of the checkout and are not installed with ``wav2vec2``.
"""
