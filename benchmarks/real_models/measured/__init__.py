"""Every row of the table of real models in one resumable run, by the product's own cache.

    python -m benchmarks.real_models measure --model FOLDER --routers ARTEFACT --data TEXTS ... --out DIR
    python -m benchmarks.real_models join --run DIR --out benchmarks/results/real_MODEL_DATE.json

`work.py` lists the pieces in their order of value, `pieces.py` runs them: each leaves a file of its own as
soon as it is done, and several processes share the list.
"""
