"""The dense base model: a Llama trained from scratch on the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.corpus import load
from benchmarks.quality.scale import Scale


def train_base(scale: Scale, texts: Path, folder: Path, minutes: float | None = None) -> None:
    """Trains the base into `folder`/model, unless it is there; takes up a run that was cut short.

    `texts` is the folder that `corpus.prepare` filled.

    In several processes (`accelerate launch`) the rows of a step are shared out between them.
    """
    if (folder / "model" / "config.json").exists():
        return
    if scale.shipped is not None:
        import modlab

        modlab.load(scale.shipped, dtype="float32")[0].save_pretrained(folder / "model")
        return
    from accelerate import PartialState
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from modlab.training.loop import TrainConfig, train

    corpus = load(scale, texts)
    set_seed(0)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.tokenizer),
            hidden_size=scale.hidden,
            intermediate_size=scale.inner,
            num_hidden_layers=scale.layers,
            num_attention_heads=scale.heads,
            num_key_value_heads=scale.kv_heads,
            max_position_embeddings=scale.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    world = PartialState().num_processes
    config = TrainConfig(
        out=folder,
        tokens=scale.base_tokens,
        max_minutes=minutes,
        batch_size=scale.batch_size // world,
        grad_accum=2,  # steps of twice an arm's rows: the base's learning rate is five times theirs
        lr=scale.base_lr,
        log_every=50,
        save_every=200,
        resume="auto",
        compile=torch.cuda.is_available(),
    )
    heldout = torch.cat([rows[:8] for rows in corpus.heldout.values()])
    result = train(model, corpus.train, config, eval_data=heldout, tokenizer=corpus.tokenizer)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "stopped": result.stopped,
        "last": {k: v for k, v in result.history.iloc[-1].items() if v == v},
    }
    if PartialState().is_main_process:
        (folder / "base.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps(facts))


def load_base(folder: Path, device: str) -> Any:
    """The base in fp32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return model.to(device).eval()
