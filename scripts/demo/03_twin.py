"""Stage 3: the twin. The dense base, converted and trained on until it keeps the wanted share of tokens."""

from __future__ import annotations

import time

import common


def main() -> None:
    parser = common.parser(__doc__ or "")
    common.training_arguments(parser, lr=6e-4, seed=1)
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="mean share kept in the routed layers")
    parser.add_argument("--lam", type=float, default=4.0, help="weight of the two-sided target")
    parser.add_argument(
        "--ramp", type=float, default=0.3, help="share of the run over which the target falls"
    )
    parser.add_argument(
        "--what-if", type=float, default=1.0, help="share of steps that run skipped tokens too"
    )
    parser.add_argument("--router-lr", type=float, help="peak learning rate of the routers")
    parser.add_argument("--kl", type=float, default=0.0, help="weight of KL to the dense base")
    args = parser.parse_args()
    started = time.perf_counter()

    import modlab
    from modlab.routing.state import routing_of
    from modlab.training.loop import TrainConfig, train

    common.fast_matmul()
    tokenizer, rows, heldout = common.load_data(args.out)
    base = args.out / "runs" / "02_dense" / "model"
    model, _ = modlab.load(base)
    teacher = modlab.load(base)[0] if args.kl else None
    modlab.convert(model, modlab.MoDConfig(skip="layer", layers="alternate"))
    routing = routing_of(model)
    config = TrainConfig(
        **common.training_settings(args, "03_twin"),
        objective="target",
        keep_ratio=args.keep_ratio,
        lam=args.lam,
        ramp=args.ramp,
        what_if=args.what_if,
        router_lr=args.router_lr,
        kl=args.kl,
    )
    result = train(model, rows, config, eval_data=heldout, teacher=teacher, tokenizer=tokenizer)
    if result.stopped == "finished":
        common.export(result.model, tokenizer, args.out / "export" / "mod")
    common.write_log(
        args.out,
        "03_twin",
        started,
        mod=routing.config.to_dict(),
        routed_layers=routing.layers,
        **common.training_log(result, config),
    )


if __name__ == "__main__":
    main()
