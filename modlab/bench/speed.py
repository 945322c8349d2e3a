"""Case `speed`: everything that docs/results.md states about one GPU, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from modlab.bench.fast import Variant, Workload, fast_models
from modlab.bench.ideal import step_bytes
from modlab.bench.limits import need_gpu, peak_rows, throughput_rows
from modlab.bench.registry import Row, Settings, case
from modlab.bench.training import train_rows

SPARSE, HALF = Variant("alternate", 0.10), Variant("most", 0.50)
OPEN = Variant("alternate", 1.00)
UNEQUAL = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
LONG, SHORT, PEAK, SEQUENCE = 32768, 4096, 65536, 4096
NEW_TOKENS = 65


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times[2:])


def with_bandwidth(row: Row, workload: Workload, copied: float) -> Row:
    """A decoding row with the share of the copy bandwidth that the dense step reaches."""
    if row["case"] != "decode":
        return row
    halfway = [int(n + workload.tokens / 2) for n in workload.lengths]
    read = step_bytes(workload.dense.config, halfway, {}, workload.settings.dtype.itemsize)
    reached = read / (row["dense_ms"] / 1e3)
    return row | {
        "dense_tb_s": round(reached / 1e12, 3),
        "copy_tb_s": round(copied / 1e12, 3),
        "bandwidth_share": round(reached / copied, 3),
    }


@case
def speed(settings: Settings) -> Iterator[Row]:
    """The GPU suite: generate at 4k and 32k, batches of 8 and 16, memory, throughput, a training step."""
    need_gpu(settings, "speed")
    yield from train_rows(settings, SEQUENCE, 2, 0.25)
    torch.cuda.empty_cache()
    yield from _generation(settings)


def _generation(settings: Settings) -> Iterator[Row]:
    copied = copy_bandwidth(settings.device)
    with fast_models(settings, PEAK + NEW_TOKENS, ["alternate", "most"]) as (dense, twins):

        def work(lengths: Sequence[int]) -> Workload:
            return Workload(settings, dense, twins, lengths, NEW_TOKENS)

        for length in (SHORT, LONG):
            workload = work([length])
            for row in workload.rows([SPARSE, HALF, OPEN], settings.repeats):
                yield with_bandwidth(row, workload, copied)
        yield from work(UNEQUAL).rows([SPARSE, HALF], settings.repeats)
        yield from work([LONG] * 16).rows([SPARSE, HALF], 1, whole_warm_up=False)
        yield from peak_rows(settings, dense, twins, PEAK, SPARSE)
        yield from throughput_rows(settings, dense, twins, LONG, SPARSE)
        yield from work([LONG]).static_rows(SPARSE, 1)
