"""What files and folders of modlab survive: kills while saving, damaged and hostile files.

    python -m benchmarks.robustness   # 200 kills a kind, 5,000 files a parser: benchmarks/results/robustness/

The tests run the same with fewer (`tests/benchmarks/test_robustness.py`; all of it with `--long`).
"""
