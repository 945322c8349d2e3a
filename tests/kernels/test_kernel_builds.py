"""The Triton kernels compile for a Hopper GPU, on a machine that has none.

The interpreter, in which the other tests run them without a GPU, accepts code that the compiler refuses.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import python_path

pytest.importorskip("triton", reason="Triton is not installed")

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modlab.kernels import decode_attention, decode_linear, decode_router, int8, kept_attention, ring_budget
from modlab.kernels import router_logits, weighed_attention


def build(kernel, signature, constants, **options):
    types = signature | dict.fromkeys(constants, "constexpr")
    # As launched: what is aligned is loaded ahead, into shared memory.
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n.startswith("stride")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    built = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=aligned), target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    assert built.metadata.shared < 227 * 1024, "more shared memory than a multiprocessor has"
    print(kernel.__name__, "cubin" in built.asm)


for kernel in (int8._encode,):
    assert [p.name for p in kernel.params if p.do_not_specialize] == ["S"], kernel
for kernel in (kept_attention._store, kept_attention._attend_kept):  # one build, however long the line
    assert [p.name for p in kernel.params if p.do_not_specialize] == ["places", "capacity"], kernel
STRIDES = {f"stride_{name}": "i32" for name in ("qb", "qn", "kb", "kg", "vb", "vg")}
LINE_STRIDES = {f"stride_{name}": "i32" for name in ("qn", "qs", "kg", "ks", "vg", "vs")}
for t in ("*bf16", "*fp32"):
    state = {"lengths_ptr": "*i32", "keep_ptr": "*i1"}
    parts = {"part_ptr": "*fp32", "part_lse_ptr": "*fp32", "share_ptr": "*i32"}
    layout = {"G": 8, "B": 16, "GATES": 8}
    heads = {"HK": 128, "HV": 128, "BLOCK_HK": 128, "BLOCK_HV": 128}
    new = {"k_ptr": t, "v_ptr": t, "table_ptr": "*i64"}
    for ring, budget, codes in ((0, 0, 0), (128, 0, 0), (128, 1, 0), (128, 1, 1)):
        layout |= {"BUDGET": budget == 1, "INT8": codes == 1}
        state |= dict.fromkeys(("shift_ptr", "key_step_ptr", "value_step_ptr"), "*fp32" if codes else "*i32")
        state |= {"ring_ptr": "*i1" if ring else "*i32", "position_ptr": "*i64" if ring else "*i32"}
        state |= {"place_ptr": "*i32"}
        build(
            decode_attention._attend_share,
            {"q_ptr": t, **new, **state, "column_ptr": "*i32", **parts, **STRIDES, "scale": "fp32"},
            {**layout, **heads, "RING": ring, "M": 4, "BLOCK_M": 16, "BLOCK_B": 16,
             "BLOCK_K": (64 if t == "*bf16" else 32) * (1 + codes), "IEEE": t == "*fp32",
             **dict.fromkeys(("ASM", "DIGITS"), codes == 1 and t == "*bf16")},
            num_warps=4, num_stages=3,
        )
        strides = {name: kind for name, kind in STRIDES.items() if "_q" not in name}
        build(
            decode_attention._join_parts, {**parts, "out_ptr": t, **new, **state, **strides},
            {**layout, **heads, "RING": ring, "N": 32, "BLOCK_P": 64}, num_warps=4,
        )
    build(
        int8._encode,
        {**dict.fromkeys(("k_ptr", "v_ptr", "keys_ptr", "values_ptr"), t),
         **dict.fromkeys(("shift_ptr", "key_step_ptr", "value_step_ptr"), "*fp32"),
         **dict.fromkeys(("key_codes_ptr", "value_codes_ptr"), "*i8"),
         **dict.fromkeys(("key_steps_ptr", "value_steps_ptr"), "*fp16"),
         **{name: kind for name, kind in LINE_STRIDES.items() if "_q" not in name}, "S": "i32"},
        {**heads, "BLOCK_S": int8.BLOCK}, num_warps=4,
    )
    for kind in ("*i8", "*fp16") if t == "*bf16" else ():  # codes and steps move as keys and values do
        size = {"*i8": 128, "*fp16": 1}[kind]
        build(
            kept_attention._store,
            {**dict.fromkeys(("k_ptr", "v_ptr", "keys_ptr", "values_ptr"), kind), "before_ptr": "*i32",
             "blocks_ptr": "*i32", "starts_ptr": "*i64", "ring_ptr": "*i8", "places": "i32",
             "capacity": "i32",
             **{name: kind for name, kind in LINE_STRIDES.items() if "_q" not in name}},
            {"A": 8, **dict.fromkeys(("HK", "HV", "BLOCK_HK", "BLOCK_HV"), size),
             "BLOCK_S": 128, "W": 128}, num_warps=4,
        )
    build(
        ring_budget._make_room,
        {"table_ptr": "*i64", "lengths_ptr": "*i32", "ring_ptr": "*i8", "gate_ptr": "*fp32",
         "position_ptr": "*i64", "scores_ptr": "*fp32", "place_ptr": "*i32", "most_ptr": "*i32",
         "keep_first": "i32"},
        {"GATES": 8, "W": 128, "FIRST": 2.0, "BLOCK": 1024}, num_warps=4,
    )
    if t == "*bf16":
        rows = dict.fromkeys(("T", "N", "G", "window"), "i32") | {"scale": "fp32"}
        kept = {"Q": t, "K": t, "V": t, "WEIGHT": "*fp32"}
        slopes = kept | {"D_OUT": t, "LSE": "*fp32", "DELTA": "*fp32"}
        for size, forward in ((64, weighed_attention.FORWARD), (128, weighed_attention.WIDE)):
            for kernel, types, launch in (
                (weighed_attention._forward, kept | {"OUT": t, "LSE": "*fp32"} | rows, forward),
                (weighed_attention._backward_keys,
                 slopes | {"DK": t, "DV": t, "DW": "*fp32"} | rows | {"scale_e": "fp32"},
                 weighed_attention.KEYS),
                (weighed_attention._backward_queries,
                 slopes | {"DQ": t} | rows | {"scale_e": "fp32"}, weighed_attention.QUERIES),
            ):
                blocks = {"H": size, "BQ": launch["BQ"], "BK": launch["BK"]}
                options = {name: launch[name] for name in ("num_warps", "num_stages")}
                build(kernel, types, blocks, **options)
    half = t == "*bf16"
    build(
        kept_attention._attend_kept,
        {"q_ptr": t, "k_ptr": t, "v_ptr": t, "keys_ptr": t, "values_ptr": t, "before_ptr": "*i32",
         "starts_ptr": "*i64", "blocks_ptr": "*i32", "heads_ptr": "*i64", "out_ptr": t, **LINE_STRIDES,
         "scale": "fp32", "places": "i32", "capacity": "i32"},
        {"N": 32, "M": 4, "A": 8, **heads, "BLOCK_Q": 128 if half else 32, "BLOCK_K": 64 if half else 32,
         "W": 128, "IEEE": not half},
        num_warps=8 if half else 4, num_stages=3 if half else 2,
    )
    build(
        decode_router._route,
        {"x_ptr": t, "weight_ptr": "*fp32", "bias_ptr": "*fp32", "threshold_ptr": "*fp32",
         "position_ptr": "*i64", "forced_ptr": "*i64", "gate_ptr": "*fp32", "keep_ptr": "*i8",
         "any_ptr": "*i8", "stride_x": "i32", "rows": "i32", "keep_first": "i32"},
        {"D": 4096, "BLOCK_B": 4, "BLOCK_D": 2048}, num_warps=8,
    )
    build(
        kept_attention._store,
        {"k_ptr": t, "v_ptr": t, "before_ptr": "*i32", "blocks_ptr": "*i32", "starts_ptr": "*i64",
         "keys_ptr": t, "values_ptr": t, "ring_ptr": "*i8", "places": "i32", "capacity": "i32",
         **{name: kind for name, kind in LINE_STRIDES.items() if "_q" not in name}},
        {"A": 8, **heads, "BLOCK_S": 128 if half else 32, "W": 128}, num_warps=4,
    )
    weights = {"weight_ptr": "*fp32", "stride_x": "i32", "rows": "i32"}
    build(
        decode_router._project, {"x_ptr": t, "into_ptr": "*fp32", "out_ptr": "*fp32", **weights},
        {"A": 8, "UNITS": 24, "D": 4096, "NORMALISED": True, "BLOCK_B": 4, "BLOCK_D": 2048}, num_warps=8,
    )
    build(
        decode_router._decide,
        {**dict.fromkeys(("in_ptr", "bias_ptr", "out_ptr", "threshold_ptr", "gate_ptr"), "*fp32"),
         "position_ptr": "*i64", "forced_ptr": "*i64", "keep_ptr": "*i8", "any_ptr": "*i8", "rows": "i32",
         "keep_first": "i32"},
        {"A": 8, "K": 16, "BLOCK_A": 8, "BLOCK_K": 16, "BLOCK_B": 4}, num_warps=8,
    )
    if half:
        for A, K, tokens in ((8, 16, 4096), (8, 16, 32768), (64, 64, 4096), (64, 64, 32768)):
            assert max(A, 16) + K <= router_logits.WIDEST
            tile = router_logits.usual_tile(tokens, max(A, 16) + K, 132)
            build(
                router_logits._wide_logits,
                {"x_ptr": t, **weights,
                 **dict.fromkeys(("bias_ptr", "into_ptr", "back_ptr", "out_ptr"), "*fp32")},
                {"A": A, "K": K, "D": 4096, "BLOCK_A": max(A, 16), "BLOCK_K": K, "BLOCK_S": tile.tokens,
                 "BLOCK_D": tile.inputs, "SHARES": tile.shares},
                num_warps=tile.warps, num_stages=tile.stages,
            )
            build(
                router_logits._sum_shares,
                {**dict.fromkeys(("sums_ptr", "bias_ptr", "back_ptr", "out_ptr"), "*fp32"), "rows": "i32"},
                {"A": A, "K": K, "D": 4096, "BLOCK_A": max(A, 16), "BLOCK_K": K,
                 "BLOCK_S": router_logits.BLOCK_S, "SHARES": 4},
                num_warps=1,
            )
    build(
        router_logits._logits,
        {"x_ptr": t, "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*fp32", "stride_x": "i32",
         "rows": "i32"},
        {"D": 4096, "BLOCK_S": 16, "BLOCK_D": 512}, num_warps=4,
    )
    for even in (True, False):
        build(
            decode_linear._row_times_vector,
            {"x_ptr": t, "weight_ptr": t, "bias_ptr": t, "out_ptr": t, "stride_e": "i32", "D": "i32"},
            {"HAS_BIAS": even, "BLOCK": 1024, "EVEN": even}, num_warps=4,
        )
        for tile in (decode_linear.NARROW, decode_linear.WIDE):
            build(
                decode_linear._rows_times_matrix,
                {"x_ptr": t, "weight_ptr": t, "bias_ptr": t, "out_ptr": t,
                 **dict.fromkeys(("stride_x", "stride_e", "rows", "D", "E"), "i32")},
                {"HAS_BIAS": even, "BLOCK_B": 16, "BLOCK_D": tile.inputs, "BLOCK_E": tile.outputs,
                 "EVEN": even, "IEEE": t == "*fp32"},
                num_warps=tile.warps, num_stages=tile.stages,
            )
"""


ROUTERS = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modlab.kernels import router_logits

architecture, limit = int(sys.argv[1]), int(sys.argv[2]) * 1024
half = router_logits.WIDEST // 2
quarter = router_logits.MOST_COLUMNS // 2
sizes = [(quarter, quarter, 4096), (half, half, 4096), (half, half, 32768)]
for A, K, tokens in sizes[: int(sys.argv[3])]:
    tile = router_logits.usual_tile(tokens, A + K, 132)
    types = {"x_ptr": "*fp16", "weight_ptr": "*fp32", "stride_x": "i32", "rows": "i32"}
    types |= dict.fromkeys(("bias_ptr", "into_ptr", "back_ptr", "out_ptr"), "*fp32")
    constants = {"A": A, "K": K, "D": 4096, "BLOCK_A": A, "BLOCK_K": K, "BLOCK_S": tile.tokens,
                 "BLOCK_D": tile.inputs, "SHARES": tile.shares}
    built = triton.compile(
        ASTSource(router_logits._wide_logits, types | dict.fromkeys(constants, "constexpr"),
                  constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    assert built.metadata.shared < limit, (A, K, tile, built.metadata.shared)
    print("cubin" in built.asm)
"""


SMALLEST = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modlab.kernels import decode_attention, decode_linear, kept_attention, router_logits, weighed_attention


def build(kernel, signature, constants, tile):
    constants = constants | tile
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n.startswith("stride")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    types = signature | dict.fromkeys(constants, "constexpr")
    built = triton.compile(
        ASTSource(kernel, types, constexprs=constants, attrs=aligned), target=GPUTarget("cuda", 86, 32),
        options=options,
    )
    print(kernel.__name__, built.metadata.shared <= 64 * 1024)


for t, H, tiles, queries in (
    ("*fp16", 128, kept_attention.TILES, 128), ("*fp32", 256, kept_attention.SMALL_TILES, 32)
):
    strides = {f"stride_{name}": "i32" for name in ("qn", "qs", "kg", "ks", "vg", "vs")}
    build(
        kept_attention._attend_kept,
        {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr", "out_ptr"), t),
         "before_ptr": "*i32", "starts_ptr": "*i64", "blocks_ptr": "*i32", "heads_ptr": "*i64", **strides,
         "scale": "fp32", "places": "i32", "capacity": "i32"},
        {"N": 32, "M": 4, "A": 8, "HK": H, "HV": H, "BLOCK_HK": H, "BLOCK_HV": H, "BLOCK_Q": queries,
         "W": 128, "IEEE": t == "*fp32"},
        tiles[-1],
    )
strides = {f"stride_{name}": "i32" for name in ("qb", "qn", "kb", "kg", "vb", "vg")}
for codes in (False, True):
    build(
        decode_attention._attend_share,
        {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "part_ptr", "part_lse_ptr"), "*fp32"),
         "table_ptr": "*i64", "lengths_ptr": "*i32", "keep_ptr": "*i1", "column_ptr": "*i32",
         "share_ptr": "*i32", "ring_ptr": "*i1", "position_ptr": "*i64", "place_ptr": "*i32", **strides,
         "scale": "fp32",
         **dict.fromkeys(("shift_ptr", "key_step_ptr", "value_step_ptr"), "*fp32" if codes else "*i32")},
        {"G": 8, "B": 16, "GATES": 8, "BUDGET": True, "HK": 256, "HV": 256, "BLOCK_HK": 256, "BLOCK_HV": 256,
         "RING": 128, "M": 4, "BLOCK_M": 16, "BLOCK_B": 16, "IEEE": True, "INT8": codes, "ASM": False,
         "DIGITS": False},
        decode_attention.SMALL_TILES[-1],
    )
build(
    decode_linear._rows_times_matrix,
    {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*fp32"),
     **dict.fromkeys(("stride_x", "stride_e", "rows", "D", "E"), "i32")},
    {"HAS_BIAS": True, "BLOCK_B": 16, "EVEN": True, "IEEE": True}, decode_linear.SMALL.sizes,
)
build(
    router_logits._wide_logits,
    {"x_ptr": "*fp16",
     "weight_ptr": "*fp32", "bias_ptr": "*fp32", "into_ptr": "*fp32", "back_ptr": "*fp32",
     "out_ptr": "*fp32", "stride_x": "i32", "rows": "i32"},
    {"A": 64, "K": 64, "D": 4096, "BLOCK_A": 64, "BLOCK_K": 64}, router_logits.SMALL.sizes,
)
rows = dict.fromkeys(("T", "N", "G", "window"), "i32") | {"scale": "fp32"}
kept = {"Q": "*fp16", "K": "*fp16", "V": "*fp16", "WEIGHT": "*fp32"}
slopes = kept | {"D_OUT": "*fp16", "LSE": "*fp32", "DELTA": "*fp32", **rows, "scale_e": "fp32"}
for kernel, types, tile in (
    (weighed_attention._forward, kept | {"OUT": "*fp16", "LSE": "*fp32"} | rows, weighed_attention.SMALL),
    (weighed_attention._backward_keys, slopes | {"DK": "*fp16", "DV": "*fp16", "DW": "*fp32"},
     weighed_attention.SMALL_KEYS),
    (weighed_attention._backward_queries, slopes | {"DQ": "*fp16"}, weighed_attention.SMALL),
):
    build(kernel, types, {"H": 128}, tile)
"""


def run_alone(code: str, cache: Path, *arguments: str) -> list[str]:
    """Words that code prints in a process without the interpreter."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": python_path()}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_every_kernel_compiles(tmp_path: Path) -> None:
    assert run_alone(BUILD, tmp_path).count("True") == 60


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize(("architecture", "kib", "sizes"), [(75, 64, 2), (86, 99, 3)])
def test_the_widest_routers_of_a_prefill_fit_smaller_gpus(
    architecture: int, kib: int, sizes: int, tmp_path: Path
) -> None:
    """On sm_75 in short lines alone: the tile of long ones takes Triton half a minute there (48 KB)."""
    built = run_alone(ROUTERS, tmp_path, str(architecture), str(kib), str(sizes))
    assert built == ["True"] * sizes


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_smallest_tiles_fit_small_gpus(tmp_path: Path) -> None:
    """Into 64 KB, of 99 that sm_86 has: the largest heads in the types that take most. (For sm_75 a build
    takes Triton minutes.)"""
    built = run_alone(SMALLEST, tmp_path)
    assert built[1::2] == ["True"] * 9, dict(zip(built[::2], built[1::2], strict=True))
