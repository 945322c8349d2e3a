"""How good a model stays: conversion recipes and controls at equal data and budget, on a base trained here.

    python -m benchmarks.quality all --scale smoke        # minutes on two cores: shows that it runs
    python -m benchmarks.quality all --scale full         # what docs/quality.md reports; hours of one GPU

Reads as the data flows: scale.py (sizes and budgets) -> corpus.py (tokens) -> base.py (the dense model) ->
arms.py with mechanisms.py (what is compared) -> run.py (one arm, many arms) -> score.py with cost.py
(measures) -> report.py (the result file and the page).
"""
