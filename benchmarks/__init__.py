"""Measurements: committed results, the quality study, real models, and what runs on GPUs."""
