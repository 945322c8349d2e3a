"""Stage 4, the control: the dense base trained on over the twin's tokens, in their order, at their rate."""

from __future__ import annotations

import time
from argparse import Namespace

import common


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--minutes", type=float, help="stop there, resumable")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile on CUDA")
    args = parser.parse_args()
    started = time.perf_counter()

    import torch

    import modlab
    from modlab.training.loop import TrainConfig, train

    common.fast_matmul()
    twin = common.read_log(args.out, "03_twin")
    names = ("batch_size", "grad_accum", "lr", "seed", "log_every", "eval_batches")
    same = Namespace(
        out=args.out,
        steps=twin["steps"],
        minutes=args.minutes,
        **{name: twin["settings"][name] for name in names},
    )
    tokenizer, rows, heldout = common.load_data(args.out)
    model, _ = modlab.load(args.out / "runs" / "02_dense" / "model")
    config = TrainConfig(
        **common.training_settings(same, "04_dense_continuation"),
        compile=torch.cuda.is_available() and not args.no_compile,
    )
    result = train(model, rows, config, eval_data=heldout, tokenizer=tokenizer)
    if result.stopped == "finished":
        common.export(result.model, tokenizer, args.out / "export" / "dense_continuation")
    common.write_log(args.out, "04_dense_continuation", started, **common.training_log(result, config))


if __name__ == "__main__":
    main()
