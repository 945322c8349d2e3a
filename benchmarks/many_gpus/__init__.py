"""Several GPUs against one, in one call with a time limit:

    python -m benchmarks.many_gpus --gpus 2 --model SMALL LARGE --out DIR [--seconds 470]
    python -m benchmarks.many_gpus --gpus 8 --only llama-3-70b --out DIR

Training with copies (DDP) and sharded (FSDP2): routers with a gate a KV head distilled to the dense self,
prompts that leave as well, and all weights; tokens a second, loss and keep ratio against one GPU, of more
than two against two. A sharded run of which a process is killed, taken up by half as many GPUs, step by step
against the run that it would have been. A process whose tokens all skip. The 70B shape, which is asked for by
name: prompts, and ten steps of distillation under FSDP2.
Inference of a long prompt spread by `device_map` and by the tensor-parallel plan, by layer and by KV head:
logits, decisions and tokens against one GPU, bytes of weights and K/V on each. Notebook 6. What was allocated
stands next to what `modlab plan` said. NVLink multicast is left off.

Every part is a command of its own with a limit and a log; they run in order of value, those of one GPU side
by side, and one that fails is left behind. DIR/many_gpus_DATE.json is written again after each, the logs are
in DIR/many_gpus_DATE_logs.tar.gz. A model is a folder; one that holds a config and no weights gets random
ones, and the file says so.

`--toy` tries every part on the CPU with a tiny model and gloo: what it writes says so and is no result.
"""
