"""Stage 2: the dense base model, a small Llama trained from scratch."""

from __future__ import annotations

import time

import common


def main() -> None:
    parser = common.parser(__doc__ or "")
    common.training_arguments(parser, lr=2e-3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=256, help="in heads of 32")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile on CUDA")
    args = parser.parse_args()
    started = time.perf_counter()

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from modlab.training.loop import TrainConfig, train

    common.fast_matmul()
    tokenizer, rows, heldout = common.load_data(args.out)
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 5 // 2,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=max(1, args.hidden // 64),
            head_dim=32,
            max_position_embeddings=common.SEQ_LEN,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(rows):,} rows of {common.SEQ_LEN} tokens")
    config = TrainConfig(
        **common.training_settings(args, "02_dense"),
        compile=torch.cuda.is_available() and not args.no_compile,
    )
    result = train(model, rows, config, eval_data=heldout, tokenizer=tokenizer)
    if result.stopped == "finished":
        common.export(result.model, tokenizer, args.out / "export" / "dense")
    common.write_log(
        args.out, "02_dense", started, parameters=parameters, **common.training_log(result, config)
    )


if __name__ == "__main__":
    main()
