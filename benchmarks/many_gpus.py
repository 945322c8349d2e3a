"""Several GPUs against one, in one call:

    python -m benchmarks.many_gpus --gpus 2 --model FOLDER --out benchmarks/results

Training with copies (DDP) and sharded (FSDP2), tokens a second and the loss of every step against one GPU; a
sharded run taken up by one GPU. All of it twice: all weights on the loss and a teacher, and routers with a
gate a KV head distilled to the dense self. Inference of the same model on one GPU, spread by `device_map` and
by the tensor-parallel plan, there with a gate a KV head, too: logits against one GPU, bytes of weights and
K/V. What was allocated stands next to what `modlab plan` said. NVLink multicast is left off.

`--toy` tries every part on the CPU with a tiny model and gloo: what it writes says so and is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import modlab
from modlab.bench.results import circumstances

TRAINED = ("one", "ddp", "fsdp2", "resumed")
DISTILLED = tuple(f"{way} distilled" for way in TRAINED)
BY_HEAD = "tensor parallel by head"
PARTS = (*TRAINED, *DISTILLED, "tensor parallel", BY_HEAD, "device_map")
HEADS: dict[str, Any] = {"gates": "kv_head", "router_hidden": 16}
"""Routers that are distilled, and those of the part `BY_HEAD`."""


def main() -> None:
    """All parts, each in processes of its own, and one file with what they found."""
    options = _options()
    if options.part is not None:
        return _part(options)
    out = options.out / f"many_gpus_{time.strftime('%Y-%m-%d')}{'_toy' if options.toy else ''}"
    out.mkdir(parents=True, exist_ok=True)
    if options.toy:
        options.model = _toy(out)
    found: dict[str, Any] = {}
    for part in PARTS:
        file = out / f"{part.replace(' ', '_')}.json"
        seconds = time.perf_counter()
        done = subprocess.run(_command(options, part, file), env=_environment(options), text=True)
        if done.returncode or not file.exists():
            found[part] = {"failed": done.returncode}
            continue
        found[part] = json.loads(file.read_text()) | {"seconds": time.perf_counter() - seconds}
    rows = {"toy": options.toy, "command": " ".join(sys.argv), "parts": found, "compared": _compared(found)}
    (out / "all.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows["compared"], indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id, dense")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of a global batch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--toy", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        options.rows, options.length, options.context, options.steps = 4, 192, 300, 3
    elif options.model is None:
        parser.error("--model is needed")
    return options


def _toy(out: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out / "toy")
    return str(out / "toy")


def _environment(options: argparse.Namespace) -> dict[str, str]:
    more = {"NCCL_NVLS_ENABLE": "0"}
    if options.toy:
        more |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **more}


def _command(options: argparse.Namespace, part: str, file: Path) -> list[str]:
    several = part.startswith(("ddp", "fsdp2", "tensor parallel"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]
    launch += [str(options.gpus), "--multi_gpu", "--main_process_port", "0"] if several else ["1"]
    if part.startswith("fsdp2") and not options.toy:  # on a CPU accelerate does not know FSDP
        launch = [word for word in launch if word != "--multi_gpu"] + ["--use_fsdp", "--fsdp_version", "2"]
        launch += ["--fsdp_cpu_ram_efficient_loading", "false"]
    own = ["--model", options.model, "--out", str(options.out), "--gpus", str(options.gpus)]
    for name in ("rows", "length", "context", "steps"):
        own += [f"--{name}", str(getattr(options, name))]
    own += ["--toy"] if options.toy else []
    return [*launch, "-m", "benchmarks.many_gpus", *own, "--part", part, "--file", str(file)]


def _part(options: argparse.Namespace) -> None:
    trains = options.part in (*TRAINED, *DISTILLED)
    found = _trained(options) if trains else _inferred(options)
    if int(os.environ.get("RANK", "0")) == 0:
        options.file.write_text(json.dumps(found, indent=2), encoding="utf-8")


def _trained(options: argparse.Namespace) -> dict[str, Any]:
    """All weights, with the loss and a dense teacher, or routers distilled; figures of every step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    way, _, distilled = options.part.partition(" ")
    if way == "fsdp2" and options.toy:
        from tests.helpers.sharding import launched_with_fsdp

        launched_with_fsdp()
    dtype = "float32" if options.toy else "bfloat16"
    model = _loaded(options, dtype=dtype)
    teacher = None if distilled else _loaded(options, dtype=dtype)
    modlab.convert(model, modlab.MoDConfig(layers="all", **(HEADS if distilled else {})))
    kind: dict[str, Any] = {"lr": 1e-4, "kl": 1.0}
    if distilled:
        kind = {"objective": "distil", "keep_ratio": 0.25}
    folder = options.file.parent / f"run_{'fsdp2' if way == 'resumed' else way}{distilled and '_distilled'}"
    generator = torch.Generator().manual_seed(0)
    top = min(model.config.vocab_size, 30_000)
    data = torch.randint(3, top, (options.rows * options.steps, options.length), generator=generator)
    config = modlab.TrainConfig(
        out=folder, steps=options.steps + (2 if way == "resumed" else 0),
        batch_size=options.rows // world, log_every=1, save_every=options.steps, resume="auto",
        calibrate=False, num_workers=0, **kind,
    )  # fmt: skip
    result = modlab.train(model, data, config, teacher=teacher)
    history = result.history
    return {
        "processes": world,
        "loss": history["loss"].tolist(),
        "keep_ratio": history["keep_ratio"].tolist(),
        "tokens_per_s": float(history["tokens_per_s"].iloc[len(history) // 2 :].median()),
        "allocated": _allocated(),
        "planned": _planned(options, "routers" if distilled else "weights"),
        **circumstances(_device(), getattr(torch, dtype)),
    }


def _inferred(options: argparse.Namespace) -> dict[str, Any]:
    """Logits of one long prompt, and the K/V bytes of each process."""
    dtype = "float32" if options.toy else "bfloat16"
    place: dict[str, Any] = {"tp_plan": "auto"} if options.part.startswith("tensor parallel") else {}
    if options.part == "device_map":
        cpu = {"max_memory": {"cpu": "400KB"}, "offload_folder": str(options.file.parent / "offload")}
        place = {"device_map": "auto" if options.toy else "balanced", **(cpu if options.toy else {})}
    found = _prompted(options, _loaded(options, dtype=dtype, **place))
    if int(os.environ.get("RANK", "0")) == 0:
        alone = _loaded(options, dtype=dtype).to(_device())
        expected = _prompted(options, alone)
        off = (found["logits"] - expected.pop("logits")).abs().max()
        alike = (found["keep"] == expected.pop("keep")).float().mean()
        found |= {
            "largest difference of logits": float(off),
            "decided alike": float(alike),
            "one GPU": expected,
        }
    found = {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)}
    where = circumstances(_device(), getattr(torch, dtype))
    return found | {"planned": _planned(options, "inference"), **where}


def _prompted(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    by_head = options.part == BY_HEAD
    modlab.convert(model.eval(), modlab.MoDConfig(layers="all", **(HEADS if by_head else {})))
    _scatter(model)
    ids = torch.randint(3, 250, (1, options.context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), modlab.KVTracker(model) as kv, modlab.record_routing(model) as recording:
        logits = model(ids.to(model.device), use_cache=True, logits_to_keep=8).logits.float().cpu()
    own = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return {
        "logits": logits,
        "keep": torch.cat([keep.flatten() for keep in recording.steps[0].keep.values()]).cpu(),
        "kv_bytes": sum(row["kv_bytes"] for row in kv.rows),
        "weight_bytes": sum(p.nbytes for p in own if not p.is_meta),
        "allocated": _allocated(),
    }


@torch.no_grad()
def _scatter(model: Any) -> None:
    """Untrained gates all say the same; these keep some tokens of each layer or head and drop others."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if ".mod_router." in name and not name.endswith("into"):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (0.0 if name.endswith("bias") else weight.shape[-1] ** -0.5))


def _loaded(options: argparse.Namespace, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, **more)


def _gpus() -> int:
    return torch.cuda.device_count()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if _gpus() else torch.device("cpu")


def _allocated() -> list[int]:
    """Most bytes allocated on each GPU that this process sees."""
    return [torch.cuda.max_memory_allocated(i) for i in range(_gpus())]


def _planned(options: argparse.Namespace, use: str) -> list[dict[str, Any]]:
    from modlab.plan import plan

    trains = use != "inference"
    table = plan(
        options.model,
        gpus=options.gpus,
        context=options.length if trains else options.context,
        batch=options.rows // options.gpus if trains else 1,
        kv_saving=1.0,
        checkpointing=False,
    )
    found: list[dict[str, Any]] = table[table["use"] == use].to_dict("records")
    return found


def _compared(found: dict[str, Any]) -> dict[str, Any]:
    """Each way to train against one GPU, and each way to share a model's inference."""
    said: dict[str, Any] = {part: "failed" for part, figures in found.items() if "failed" in figures}
    for part in ("ddp", "fsdp2", "ddp distilled", "fsdp2 distilled"):
        one = found["one distilled" if "distilled" in part else "one"]
        if "loss" in found[part] and "loss" in one:
            off = max(abs(a - b) for a, b in zip(one["loss"], found[part]["loss"], strict=True))
            times = found[part]["tokens_per_s"] / one["tokens_per_s"]
            said[part] = {"tokens a second, times one GPU": times, "largest difference of a loss": off}
    for part, figures in found.items():
        shared = ("largest difference of logits", "decided alike")
        if shared[0] in figures:
            said[part] = {name: figures[name] for name in shared}
    return said


if __name__ == "__main__":
    main()
