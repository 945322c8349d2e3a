"""The benchmark registry at a tiny size: rows, result files, the command line. Never a claim about time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modlab import bench, published
from modlab.bench import (
    fast,
    growth,
    ideal,
    limits,
    models,
    ordinary,
    overhead,
    registry,
    results,
    speed,
    training,
)
from modlab.config import MoDConfig
from modlab.errors import ModlabError
from modlab.measure import time_generate
from tests.helpers.launch import python_path

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    "--shape",
    "tiny",
    "--context",
    "60",
    "--repeats",
    "2",
    "--decode-tokens",
    "20",
    "--ratios",
    "0.25",
    "1.0",
]
NUMBERS = ("context", "batch", "keep_ratio", "dense_ms", "mod_ms", "speedup", "ideal", "kv_saving")


def check_rows(rows):
    for row in rows:
        assert list(row)[: len(registry.ROW_KEYS)] == list(registry.ROW_KEYS)
        assert all(isinstance(value, (str, int, float)) for value in row.values()), "rows are flat"
        assert all(isinstance(row[key], (int, float)) and row[key] > 0 for key in NUMBERS)
        assert row["case"] in ("prefill", "decode", "train", "peak", "throughput", "baseline")
        assert 0 <= row["routed_layers"] <= row["num_layers"]  # all of them with skip="kv"
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["mod_ms"], abs=0.01)
        if row["case"] == "train":  # no cache is held
            assert row["kv_bytes"] == row["dense_kv_bytes"] == 0
        else:
            assert row["kv_saving"] == pytest.approx(row["dense_kv_bytes"] / row["kv_bytes"], abs=0.001)
        assert row["dense_ms_min"] <= row["dense_ms"] <= row["dense_ms_max"]
        assert row["mod_ms_min"] <= row["mod_ms"] <= row["mod_ms_max"]


@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_and_decode_write_result_files(tmp_path, capsys, batch):
    argv = ["prefill", "decode", *SIZES, "--batch", str(batch), "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    printed = capsys.readouterr().out
    assert "speed-up" in printed and "wrote" in printed
    results = {}
    for path in tmp_path.iterdir():
        result = json.loads(path.read_text())
        assert path.name == f"{result['what']}_cpu_{result['date'][:10]}.json"
        results[result["what"]] = result
    assert set(results) == {"prefill", "decode"}
    for name, result in results.items():
        assert result["schema"] == registry.SCHEMA_VERSION
        assert result["command"].startswith("modlab bench prefill decode --shape tiny")
        assert str(tmp_path) not in json.dumps(result)
        assert result["device"] == "cpu" and result["device_name"]
        assert result["dtype"] == "float32"
        assert set(result["versions"]) == {"python", "torch", "transformers", "modlab"}
        assert result["versions"]["torch"] == torch.__version__
        assert result["cores"] >= 1 and result["threads"] >= 1
        check_rows(result["rows"])
        quarter, full = result["rows"]
        assert {row["case"] for row in result["rows"]} == {name}
        assert quarter["keep_ratio"] == 0.25 and full["keep_ratio"] == 1.0
        assert quarter["ideal"] > full["ideal"] == 1.0
        assert (quarter["routed"], quarter["routed_layers"], quarter["num_layers"]) == ("alternate", 2, 4)
        # per token: K and V, 2 heads of 16, fp32
        seen = 60 if name == "prefill" else 60 + 3 * 20
        assert full["dense_kv_bytes"] == 4 * batch * seen * 2 * 2 * 16 * 4
    kept = (2 + 2 * 0.25) / 4
    row = results["prefill"]["rows"][0]
    index = 2 * batch * 15 * 4  # a ragged layer also notes each kept token's column
    assert row["kv_bytes"] == kept * row["dense_kv_bytes"] + index


def test_the_commit_can_be_told_where_git_cannot_be_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "source_commit", lambda: None)
    argv = ["prefill", *SIZES, "--commit", "abc123", f"--out={tmp_path}"]
    assert bench.main(argv) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["commit"] == "abc123"
    assert result["command"] == "modlab bench " + " ".join(["prefill", *SIZES])


def test_a_second_run_of_a_day_overwrites_nothing(tmp_path):
    result = {
        "what": "prefill", "device": "cpu", "device_name": "x", "date": "2030-01-02T03:04:05", "rows": [{}],
    }  # fmt: skip
    names = []
    for turn in range(3):
        with results.own_file(result, tmp_path) as path:
            results.write(result | {"turn": turn}, path)
        names.append(path.name)
    assert names == [
        "prefill_cpu_2030-01-02.json",
        "prefill_cpu_2030-01-02-2.json",
        "prefill_cpu_2030-01-02-3.json",
    ]
    assert [json.loads((tmp_path / name).read_text())["turn"] for name in names] == [0, 1, 2]
    gpu = result | {"device": "cuda", "device_name": "NVIDIA H200"}
    with results.own_file(gpu, tmp_path) as first, results.own_file(gpu, tmp_path) as second:
        assert first.name == "prefill_nvidia-h200_2030-01-02.json"  # neither has measured anything yet
        assert second.name == "prefill_nvidia-h200_2030-01-02-2.json"


def test_a_run_without_rows_leaves_no_file(tmp_path):
    result = {"what": "x", "device": "cpu", "device_name": "x", "date": "2030-01-02T03:04:05", "rows": []}
    with pytest.raises(ValueError, match="no room"), results.own_file(result, tmp_path) as path:
        assert json.loads(path.read_text()) == result
        raise ValueError("no room")
    assert not list(tmp_path.iterdir())


def test_random_routing_has_the_exact_ratio_in_every_span():
    layers, spans, ratio = [1, 3], [40, 20, 20], 0.25
    keep = models.random_routing(layers, 2, spans, ratio, seed=0, device=torch.device("cpu"))
    positions = torch.arange(sum(spans)).expand(2, -1)
    masks = [keep(layer, positions.float(), positions) for layer in layers]
    for mask in masks:
        for piece in mask.split(spans, 1):
            assert (piece.sum(1) == ratio * piece.shape[1]).all()
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(keep(1, positions[:, 7:9].float(), positions[:, 7:9]), masks[0][:, 7:9])
    again = models.random_routing(layers, 2, spans, ratio, seed=0, device=torch.device("cpu"))
    assert torch.equal(again(3, positions.float(), positions), masks[1])


def test_models_share_their_weights_and_the_dense_one_stays_dense():
    settings = registry.Settings(shape="tiny")
    dense = models.dense_model(settings, 32)
    mod = models.converted_twin(dense, [1, 3])
    assert not hasattr(dense, "mod") and mod.mod.layers == [1, 3]
    own = dict(mod.named_parameters())
    assert all(own[name] is parameter for name, parameter in dense.named_parameters())


def test_ideals():
    config = models.SHAPES["tiny"].config(64)
    assert ideal.ideal_prefill(config, [64], {}) == 1.0
    half = ideal.ideal_prefill(config, [64], {1: 0.0, 3: 0.0})
    assert half == pytest.approx(2.0)
    assert ideal.ideal_decode(config, [64], {}, 4) == 1.0
    one = ideal.ideal_decode(config, [64], {1: 0.25, 3: 0.25}, 4)
    many = ideal.ideal_decode(config, [64] * 16, {1: 0.25, 3: 0.25}, 4)
    assert 1.0 < many < one < 1.6  # some row of many needs the layer nearly always


@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_ideals_count_what_is_left_out(keep):
    """What attention and MLP save, each alone, is what the layer saves."""
    config = models.SHAPES["tiny"].config(64)
    for work in (
        lambda skip, share: ideal.prefill_flops(config, [64, 20], share, MoDConfig(skip=skip)),
        lambda skip, share: ideal.decode_bytes(config, [64, 20], share, 4, MoDConfig(skip=skip)),
    ):
        saved = {skip: work(skip, 1.0) - work(skip, keep) for skip in ("layer", "attention", "mlp")}
        assert saved["attention"] + saved["mlp"] == pytest.approx(saved["layer"])
        assert min(saved.values()) > 0
    weights_and_keys = (2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 * 32) * 4  # q and o; k and v; K and V of 64 tokens
    mod = MoDConfig(skip="attention")
    whole, rest = (ideal.decode_bytes(config, [64], share, 4, mod) for share in (1.0, 0.0))
    assert whole - rest == weights_and_keys


def test_ideals_of_a_cache_that_is_decided_about_alone():
    """All operations but those with keys that are gone; all bytes but theirs."""
    config, n = models.SHAPES["tiny"].config(1024), 1000
    mod = MoDConfig(keep_recent=100)
    recent, older = 99, n - 99  # stored between two forwards: the next token is one of its own latest 100
    assert ideal.stored_tokens(n, 0.25, mod) == pytest.approx(recent + 0.25 * older)
    assert ideal.stored_tokens(50, 0.25, mod) == 50
    for share in (0.0, 0.25, 1.0):
        gone = (1 - share) * older
        saved = ideal.decode_bytes(config, [n], 1.0, 4) - ideal.decode_bytes(config, [n], share, 4, mod)
        assert saved == pytest.approx(gone * ideal.kv_token_bytes(config, 4))
        pairs = sum(max(i - recent, 0) for i in range(n)) * (1 - share)
        width = config.num_attention_heads * ideal.head_size(config)
        saved = ideal.prefill_flops(config, [n], 1.0) - ideal.prefill_flops(config, [n], share, mod)
        assert saved == pytest.approx(4 * width * pairs, rel=0.01)


@pytest.mark.parametrize("skip", ["attention", "mlp", "kv"])
def test_rows_of_models_that_skip_a_part(skip):
    settings = registry.Settings(
        shape="tiny",
        repeats=1,
        contexts=(400 if skip == "kv" else 40,),
        ratios=(0.25,),
        decode_tokens=9,
        skip=skip,
    )
    for run in (fast.generate, ordinary.prefill, ordinary.decode):
        rows = list(run(settings))
        check_rows(rows)
        for row in rows:
            assert row["skip"] == skip and row["keep_ratio"] == pytest.approx(0.25, abs=0.02)
            assert (row["kv_saving"] > 1.1) == (skip != "mlp")
            assert 1.0 < row["ideal"] < 2.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "there are decode, demo, generate"),
        (["prefill", "--ratios", "0"], "keep ratio"),
        (["prefill", "--batch", "0"], "--batch 0"),
        (["prefill", "--device", "cuda:99"], "--device cuda:99"),
        (["prefill", "--dtype", "int8"], "--dtype int8"),
        (["--plot", "absent.json"], "not a readable result file"),
    ],
)
def test_bad_arguments_are_clear_errors(argv, message):
    with pytest.raises(ModlabError, match=message):
        bench.main(argv)


def test_list_names_every_case(capsys):
    assert bench.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.CASES)


def test_demo_case_or_a_clear_reason(capsys):
    """Without the demo models the case is skipped and says so; with them its rows are checked."""
    settings = registry.Settings(contexts=(128,), repeats=1, decode_tokens=4)
    try:
        rows = list(ordinary.demo(settings))
    except registry.Skipped as reason:
        assert "demo" in str(reason)
        assert bench.main(["demo", "--no-save"]) == 1
        assert "skipped demo" in capsys.readouterr().out
        return
    check_rows(rows)
    assert [row["case"] for row in rows] == ["prefill", "decode"]
    assert 0 < rows[0]["dense_loss"] < 10 and 0 < rows[0]["mod_loss"] < 10


def test_plot_writes_a_page_that_needs_no_network(tmp_path):
    pytest.importorskip("plotly")
    assert bench.main(["prefill", *SIZES, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert bench.main(["--plot", str(path)]) == 0
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "<script src=" not in page
    figure = results.plot(json.loads(path.read_text()))
    measured, ideal = figure.data
    rows = json.loads(path.read_text())["rows"]
    assert list(measured.x) == [0.25, 1.0] and list(measured.y) == [row["speedup"] for row in rows]
    assert list(ideal.y) == [row["ideal"] for row in rows]


@pytest.fixture(scope="module")
def tiny_pair():
    """Dense and converted tiny model with fast generation, as the GPU cases use them."""
    settings = registry.Settings(shape="tiny", repeats=1)
    with fast.fast_models(settings, 300, ["alternate"]) as (dense, twins):
        yield settings, dense, twins


def test_generate_rows_are_of_the_fast_path_and_count_bytes(tiny_pair):
    settings, dense, twins = tiny_pair
    work = fast.Workload(settings, dense, twins, [40, 20], 9)
    rows = list(work.rows([fast.Variant("alternate", 0.25)], repeats=1))
    check_rows(rows)
    assert [row["case"] for row in rows] == ["prefill", "decode"]
    # 40 and 20 tokens of the prompt and 8 new ones, in 2 layers all of them, in 2 a quarter
    row = rows[0]
    assert row["tokens"] == 60 and row["dense_kv_bytes"] == 4 * (60 + 16) * 2 * 2 * 16 * 4
    kept = (row["keep_ratio"] * 2 + 2) * (60 + 16) * 2 * 2 * 16 * 4
    assert row["kept_kv_bytes"] == pytest.approx(kept, rel=1e-3)
    assert row["kept_kv_bytes"] < row["kv_bytes"]
    assert "bandwidth_share" not in speed.with_bandwidth(rows[0], work, 1e9)
    assert speed.with_bandwidth(rows[1], work, 1e9)["bandwidth_share"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are more ways there")
def test_overhead_rows_say_which_cures_were_on():
    settings = registry.Settings(shape="tiny", contexts=(40,), ratios=(0.25,), repeats=1, decode_tokens=4)
    rows = list(overhead.overhead(settings))
    check_rows(rows)
    assert [(row["compiled"], row["tokens_chosen"], row["case"]) for row in rows] == [
        ("False", chosen, case)  # a CPU compiles nothing
        for chosen in ("on the host", "in the step")
        for case in ("prefill", "decode")
    ]


def test_the_baseline_is_transformers_own_static_cache(tiny_pair):
    settings, dense, twins = tiny_pair
    work = fast.Workload(settings, dense, twins, [24], 4)
    rows = list(work.static_rows(fast.Variant("alternate", 0.25), 1))
    check_rows(rows)
    assert [(row["case"], row["what"]) for row in rows] == [("baseline", "prefill"), ("baseline", "decode")]
    assert work.times([], 1)[None], "fast generation is on again"


def test_synthetic_caches_are_as_long_as_asked(tiny_pair):
    _, dense, _ = tiny_pair
    caches = limits.synthetic_caches(dense.__dict__["mod_engine"], [[5, 60]] * 4, 0.5)
    for cache in caches:
        assert cache.lengths == [5, 60] and cache.capacities == [21, 76]
        assert torch.isfinite(cache.keys).all() and cache.keys.std() > 0.5


def test_train_rows():
    rows = list(training.train_rows(registry.Settings(shape="tiny", repeats=1), 40, 2, 0.25))
    check_rows(rows)
    assert rows[0]["case"] == "train" and rows[0]["keep_ratio"] == 0.25


def test_token_costs_are_recovered_from_exact_times():
    """Four of eight layers routed; a kept token costs 3 us a layer, a skipped one 0.5."""
    tokens, layers, head_ms = 1000, 4, 6.0
    rows = []
    for ratio in (0.1, 0.5, 1.0):
        dense_ms = head_ms + 8 * tokens * 3e-3
        mod_ms = head_ms + layers * tokens * 3e-3 + layers * tokens * (ratio * 3 + (1 - ratio) * 0.5) * 1e-3
        rows.append(
            {"routed_layers": 4, "num_layers": 8, "keep_ratio": ratio, "dense_ms": dense_ms, "mod_ms": mod_ms}
        )
    assert growth.token_costs(rows, tokens, head_ms / dense_ms) == {"kept_us": 3.0, "skipped_us": 0.5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run there")
@pytest.mark.parametrize("name", ["speed", "speed_kv", "speed_leave", "growth", "peak", "throughput"])
def test_gpu_cases_say_what_they_lack(name, capsys):
    assert bench.main([name, "--no-save"]) == 1
    assert f"skipped {name}: needs a GPU" in capsys.readouterr().out


def test_the_command_writes_where_it_is_told(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "modlab", "bench", "prefill", *SIZES, "--out", "results"],
        env={**os.environ, "PYTHONPATH": python_path()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "results").glob("prefill_cpu_*.json"))


def test_committed_results_follow_the_schema():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not files:
        pytest.skip("no published results yet")
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["what"] in published.REAL:  # losses and recall, no times; what was not recorded is null
            wanted = {"command", "commit", "date", "device_name", "dtype", "versions", "note", "rows"}
            assert wanted <= set(result) and result["rows"] and result["note"], path.name
            continue
        assert {"schema", "what", "command", "commit", "date", "device_name", "versions", "rows"} <= set(
            result
        )
        assert result["commit"] and not result["commit"].endswith("-dirty"), (
            f"{path.name}: from uncommitted code"
        )
        if result["what"] == "quality":
            wanted = {"arm", "seed", "tokens", "keep_ratio", "kv_saving", "flops_share", "loss", "dense_loss"}
            assert all(wanted | {"gap", "recall_gap"} <= set(row) for row in result["rows"])
        else:
            check_rows(result["rows"])


def test_generate_clock_sees_every_token(tiny_llama):
    prefill_ms, decode_ms = time_generate(tiny_llama, torch.randint(3, 500, (1, 8)), decode_tokens=3)
    assert prefill_ms > 0 and decode_ms > 0
