"""What modlab survives: kills while saving, damaged and hostile files, texts without an end.

    python -m benchmarks.robustness   # 200 kills a kind, 5,000 files a parser, 100,000 tokens

The tests run the same with fewer (`tests/benchmarks/test_robustness.py`; all of it with `--long`).
"""
