"""What `test_processes` launches: measures over the processes of an accelerator, one report each."""

import io
import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import modlab
from modlab import measure
from tests.helpers.handmade import make_tokenizers
from tests.helpers.models import routed_llama

WORDS = "the router decides which token runs and which token skips a layer of depth\n" * 40
BYTES = make_tokenizers()["a token a byte"]

ROWS = torch.randint(3, 500, (7, 48), generator=torch.Generator().manual_seed(4))


def batches() -> list[dict[str, torch.Tensor]]:
    """Five batches of unequal size: one with padding, one with labels."""
    mask = torch.ones_like(ROWS[2:4])
    mask[0, :11] = 0
    mask[1, 20:25] = 0
    labels = ROWS[4:5].clone()
    labels[:, :40] = -100
    return [
        {"input_ids": ROWS[:2]},
        {"input_ids": ROWS[2:4], "attention_mask": mask},
        {"input_ids": ROWS[4:5], "labels": labels},
        {"input_ids": ROWS[5:6, :9]},
        {"input_ids": ROWS[6:]},
    ]


def report() -> dict[str, object]:
    """What this process has to say."""
    model, accelerator = routed_llama(), Accelerator(cpu=True)
    found = measure.evaluate(model, batches(), accelerator=accelerator)
    rows = measure.evaluate(model, ROWS, batch_size=2, max_batches=3, accelerator=accelerator)
    table = modlab.sweep(
        model, None, batches(), [0.0, 0.4, 0.8], repeats=1, prompt_tokens=8, decode_tokens=2,
        per_layer=True, progress=False, accelerator=accelerator,
    )  # fmt: skip
    probed = {
        "recall": modlab.recall(
            model, ROWS, distances=[12, 20], passage=6, prefix=2, rows=3, batch_size=2, progress=False,
            accelerator=accelerator,
        ).to_dict("list"),
        "retrieval": modlab.retrieval(
            model, torch.tensor([BYTES(WORDS)["input_ids"]]), BYTES, distances=[150], rows=5, pairs=4,
            lead=10, batch_size=2, by_row=True, progress=False, accelerator=accelerator,
        ).to_dict("list"),
        "health": modlab.generation_health(
            model, ROWS, prompts=3, prompt_tokens=8, new_tokens=6, batch_size=2, progress=False,
            accelerator=accelerator,
        ).to_dict(),
        "calibrated": [
            dict(modlab.calibrate(
                model, batches(), keep_ratio=0.4, per_layer=per_layer, tolerance=0.1, accelerator=accelerator
            ))
            for per_layer in (False, True)
        ],
    }  # fmt: skip
    bar = tqdm(total=len(batches()), file=io.StringIO())
    generated = measure.over_ranks(
        lambda batch: model.generate(batch, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist(),
        [batch["input_ids"] for batch in batches()],
        accelerator,
        bar=bar,
    )
    timed = table[["prefill_ms", "decode_ms"]]
    assert bool((timed > 0).all().all())
    return {
        "processes": accelerator.num_processes,
        "evaluate": vars(found) | {"keep_ratio_by_layer": list(found.keep_ratio_by_layer.values())},
        "rows": [rows.loss, rows.predicted_tokens],
        "sweep": table.drop(columns=timed.columns).to_dict("list"),
        "generated": generated,
        "bar": bar.n,
        "probed": json.loads(json.dumps(probed)),
        "times": timed.to_numpy().tolist(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result = report()
    rank = Accelerator(cpu=True).process_index
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(result))
