"""How logits are read: widened to fp32 a few tokens at a time, since those of a long row may be gigabytes."""

LOSS_CHUNK = 512
"""Tokens whose logits are widened to fp32 at once."""
