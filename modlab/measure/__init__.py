"""What a threshold costs and buys: loss, keep ratio, KV bytes, time; thresholds for a wanted keep ratio.

    divergence(model, texts, tokenizer)          KL to the dense model by position, bytes (routed models)
    report(model, texts, tokenizer)              that and the paired probes, as a page and JSON
    evaluate(model, batches)                     one pass: loss, keep ratio, KV bytes (dense models too)
    sweep(model, tokenizer, texts, thresholds)   one row a threshold
    calibrate(model, batches, keep_ratio=0.25)   finds and sets the thresholds that keep this share of tokens
    over_ranks(work, batches, accelerator)       the same on the processes of `accelerate launch`, merged once

Keep ratios count real tokens in routed layers: kept / (tokens x routed layers), the first tokens that are
always kept included. Times are taken around `model.generate`, as a user calls it, and wait for the device.
"""

from modlab.data.batches import as_batches, iter_batches
from modlab.hf.model import context_length
from modlab.hf.ranks import over_ranks
from modlab.measure.calibration import Calibration, calibrate
from modlab.measure.divergence import divergence
from modlab.measure.evaluation import Evaluation, evaluate, loss
from modlab.measure.pieces import TEXT_PIECE, piece_length
from modlab.measure.reporting import Report, report
from modlab.measure.sweeps import DEFAULT_THRESHOLDS, sweep
from modlab.measure.timing import synchronize, time_generate

__all__ = [
    "DEFAULT_THRESHOLDS",
    "TEXT_PIECE",
    "Calibration",
    "Evaluation",
    "Report",
    "as_batches",
    "calibrate",
    "context_length",
    "divergence",
    "evaluate",
    "iter_batches",
    "loss",
    "over_ranks",
    "piece_length",
    "report",
    "sweep",
    "synchronize",
    "time_generate",
]
