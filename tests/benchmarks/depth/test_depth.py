"""The depth study on a tiny model: every kind of arm from the dense model to its row."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import modlab
from benchmarks.depth import compute, distil, removal, tasks
from benchmarks.depth import run as depth_run
from benchmarks.depth.__main__ import main
from benchmarks.depth.arms import ARMS, Arm, arm_named
from benchmarks.depth.distil import Plan
from benchmarks.depth.measure import dense, measure
from benchmarks.depth.model import states
from benchmarks.depth.profile import _covered
from benchmarks.depth.report import result
from benchmarks.depth.run import Study, _keep
from benchmarks.depth.saved import FACTS, Saved
from benchmarks.depth.scores import start_from_scores
from benchmarks.depth.start import start
from benchmarks.real_models.probes import Probe
from benchmarks.real_models.texts import Data
from modlab.hf.anatomy import decoder_layers
from modlab.routing.noise import Noise
from modlab.routing.trained import Trained
from modlab.training.model import _frozen, _routers_below
from tests.helpers.models import dense_llama, scatter_gates, tiny_config
from tests.helpers.tokenizers import make_tokenizer

T = 48
ORIGIN = {
    "date": "2026-11-29", "device_name": "cpu", "dtype": "float32", "commit": "0" * 40, "command": "c",
    "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense_llama().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def data() -> Data:
    random = np.random.default_rng(0)

    def rows(n: int) -> np.ndarray:
        return random.integers(3, 500, (n, T)).astype(np.int32)

    def probe() -> Probe:
        spans = [(row, at, at + 6, distance) for row in range(2) for at, distance in ((20, 8), (40, 16))]
        return Probe(rows(2), np.array(spans, dtype=np.int32))

    texts = {name: rows(12) for name in ("novels", "python", "wikitext", "headers")}
    return Data(rows(40).reshape(-1), rows(4)[:, :8], texts, probe(), probe(), rows(1)[0])


PLAN = Plan(tokens=2 * 4 * T, length=T, rows=2, batch=4 * T)


def kv_routers(at: Path, trained: Trained | None = None) -> Path:
    config = modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=16)
    model = scatter_gates(modlab.convert(dense_llama(), config))
    model.mod.trained = trained
    modlab.save_routers(model, at / "kv", "some/base")
    return at / "kv"


KINDS = [
    "leave-2/3", "leave-2/3-rank-16", "written-0.8-scored", "sublayers-0.9", "sublayers-0.8-scored-all",
    "mlp-0.9-scored-lora", "paper-alpha-0.01", "topk", "static-layer-0.8", "static-attention-0.9-lora",
    "kv+leave-2/3-4x", "kv+leave-1/2-4x-started", "kv+leave-2/3-4x-started-above",
    "kv+leave-2/3-2x-int8-started-above",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_an_arm_comes_to_its_row(name: str, folder: Path, data: Data, tmp_path: Path) -> None:
    if "lora" in name:
        pytest.importorskip("peft")
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2, start=str(kv_routers(tmp_path)))
    row = study.run(name, PLAN)
    assert 0 <= row["kl_far"] < 20 and 0 < row["compute"] <= 1 and row["tokens"] == PLAN.tokens
    assert set(row["recall_gap"]) == {"8", "16"} and row["tasks"] == {}
    assert row["ratio"] >= (1.5 if ARMS[name].int8 else 1)
    assert all(np.isfinite(kl) for _, kl, _ in row["distillation"]["curve"])
    assert json.loads((tmp_path / "out" / "rows.jsonl").read_text())["arm"] == name
    if ARMS[name].trains == "added" and not ARMS[name].removes:
        (added,) = (tmp_path / "out").glob("added_*/*.safetensors")
        assert all(".mod_" in tensor for tensor in load_file(added))


def test_a_frozen_base_stays_the_teacher(folder: Path, data: Data, tmp_path: Path) -> None:
    """Without training an arm that keeps everything has no KL; with leaving it has."""
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2)
    idle = replace(PLAN, tokens=0)
    assert study.run("leave-2/3", idle)["kl_far"] > 1e-4
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="written"))
    found = measure(model, Arm({"skip": "written"}), data, dense(dense_llama(), data, 2), [])
    assert found["kl_far"] == pytest.approx(0, abs=1e-6) and found["compute"] == 1


@pytest.mark.parametrize(
    "name", ["static-layer-0.8-free", "written-0.8-scored-free", "leave-1/2-fitted-free"]
)
def test_an_arm_without_training_trains_nothing(name: str, folder: Path, data: Data, tmp_path: Path) -> None:
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2)
    row = study.run(name, PLAN)
    assert row["tokens"] == 0 and "distillation" not in row and 0 < row["kl_far"] < 20
    assert row["compute"] == pytest.approx(0.5 if "leave" in name else 0.8, abs=0.1)
    assert study.done(name, PLAN.seed) and not study.done(name, 1) and not study.done("topk", PLAN.seed)


def test_a_failed_arm_takes_no_other_with_it(
    folder: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error is shown, the next one runs, and a second call does what is missing alone."""
    data.save(tmp_path / "tok")
    words = ["run", "--model", str(folder), "--data", str(tmp_path / "tok"), "--out", str(tmp_path / "out")]
    words += ["--measured", "1", "--tokens", "0", "--length", str(T), "--device", "cpu", "--commit", "0" * 40]
    arms = "kv+leave-2/3-4x-started-free,leave-2/3-fitted-free"
    with pytest.raises(SystemExit, match="failed: kv"):
        main([*words, "--arms", arms, "--start", str(tmp_path / "nothing")])
    assert "no routers to start from" in capsys.readouterr().err
    main([*words, "--arms", arms, "--start", str(kv_routers(tmp_path))])
    assert "leave-2/3-fitted-free is there already" in capsys.readouterr().out
    rows = [json.loads(line)["arm"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert rows == list(reversed(arms.split(",")))
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert "--start kv" in origin["command"] and str(tmp_path) not in origin["command"]


def test_a_row_is_there_before_its_tasks(
    folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What time runs out in leaves the rest behind; the next call does the arm again, in the row's place."""
    item = {"query": "w1", "choices": [" w3", " w4"], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text(f"{json.dumps(item)}\n{json.dumps(item)}\n")
    study = Study(folder, "cpu", data, tmp_path / "out", questions=tmp_path, items=2, measured=1, problems=2)
    answered = iter([1])  # of the dense model, which is not asked again

    def written(*args: Any, **given: Any) -> dict[str, Any]:
        return {"humaneval": np.array([next(answered), 1])}

    monkeypatch.setattr(tasks, "written", written)
    written_down = tmp_path / "out" / "rows.jsonl"
    with pytest.raises(StopIteration):
        study.run("leave-2/3-fitted-free", PLAN)
    (row,) = map(json.loads, written_down.read_text().splitlines())
    assert row["left"] == 1 and "piqa" in row["tasks"] and not study.done(row["arm"], 0)
    answered = iter([1])
    again = Study(folder, "cpu", data, tmp_path / "out", questions=tmp_path, items=2, measured=1, problems=2)
    again.run("leave-2/3-fitted-free", PLAN)
    (row,) = map(json.loads, written_down.read_text().splitlines())
    assert "left" not in row and row["tasks"]["humaneval"]["gap"] == 0 and study.done(row["arm"], 0)


@pytest.mark.parametrize("name", ["leave-2/3-fitted", "kv+leave-1/2-4x-started"])
def test_what_was_distilled_and_not_measured_is_measured_by_the_next_call(
    name: str, folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without training again, to the same row; another plan is trained."""
    source = str(kv_routers(tmp_path))
    studies = [Study(folder, "cpu", data, tmp_path / out, measured=2, start=source) for out in ("a", "b")]
    expected = studies[0].run(name, PLAN)
    with monkeypatch.context() as patched:
        patched.setattr(depth_run, "measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            studies[1].run(name, PLAN)
    assert not studies[1].done(name, 0)
    again = Study(folder, "cpu", data, tmp_path / "b", measured=2, start=source)
    with monkeypatch.context() as patched:
        patched.setattr(depth_run, "by_package", lambda *args: 1 / 0)
        row = again.run(name, PLAN)
        assert again.done(name, 0) and row["tokens"] == PLAN.tokens
        assert row["kl_far"] == pytest.approx(expected["kl_far"], rel=1e-5)
        assert row["recall_gap"] == pytest.approx(expected["recall_gap"], rel=1e-4, abs=1e-6)
        assert row["ratio"] == pytest.approx(expected["ratio"], rel=1e-6) and set(row) == set(expected)
        with pytest.raises(ZeroDivisionError):
            again.run(name, replace(PLAN, rate=1e-3))
        with pytest.raises(ZeroDivisionError):
            again.run(name, PLAN, seconds=600)


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("name", ["kv+leave-2/3-4x-started-above", "leave-2/3-fitted", "paper-alpha-0.01"])
def test_what_is_there_of_a_run_that_is_ended_is_measured(
    name: str, folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the last time it was saved, even if it ended while it was saving again."""
    monkeypatch.setattr(distil, "EVERY", 0.0)
    save, times = Saved.save, iter(range(9))

    def saved(self: Saved, model: Any, facts: dict[str, Any]) -> None:
        if next(times) == 2:
            self.new.mkdir()
            (self.new / FACTS).write_text('{"plan"')
            raise Killed
        save(self, model, facts)

    monkeypatch.setattr(Saved, "save", saved)
    source = str(kv_routers(tmp_path))
    plan = replace(PLAN, tokens=6 * 4 * T)
    studies = [Study(folder, "cpu", data, tmp_path / "out", measured=1, start=source) for _ in range(2)]
    with pytest.raises(Killed):
        studies[0].run(name, plan)
    monkeypatch.undo()
    row = studies[1].run(name, plan)
    assert row["distillation"]["cut"] and row["tokens"] == 2 * 4 * T and 0 < row["kl_far"] < 20
    assert studies[1].done(name, 0)
    if ARMS[name].published:
        assert row["distillation"]["epochs"] == pytest.approx(row["tokens"] / len(data.stream), abs=1e-3)
    if "keep_asked" in row:
        assert row["keep_asked"] == pytest.approx(_keep(loaded(tmp_path / "out", folder), ARMS[name], T))


def loaded(out: Path, folder: Path) -> Any:
    (at,) = (at for at in out.glob("added_*") if at.suffix != ".new")
    return Saved(at, folder).load("cpu", torch.float32)


def test_a_folder_that_is_complete_counts_wherever_it_is(folder: Path, tmp_path: Path) -> None:
    """A move may be cut short after the old folder has gone; what is not complete is as if not there."""
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="prompt"))
    saved = Saved(tmp_path / "arm", folder)
    assert saved.told() is None
    saved.save(model, {"turn": 1})
    saved.at.rename(saved.new)
    assert saved.told() == {"turn": 1} and modlab.is_converted(saved.load("cpu", torch.float32))
    saved.save(model, {"turn": 2})
    assert saved.told() == {"turn": 2} and not saved.new.exists()
    (saved.at / FACTS).write_text("{")
    assert saved.told() is None


def test_what_trains_above_has_the_same_gradients_and_no_backward_pass_below() -> None:
    """Frozen routers below cut the backward pass at the point of leaving, and change nothing above it."""
    config = modlab.MoDConfig(
        skip="kv+prompt", layers="all", gates="kv_head", router_hidden=16, keep_recent=8, leave_after=2 / 3
    )
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    found, went = [], []

    def note(index: int, module: Any, args: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda slope: went[-1].add(index))

    for above in (False, True):
        model = scatter_gates(modlab.convert(dense_llama(), config)).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mod_" in name)
        model.mod.what_if = True
        model.mod.noise = Noise(0, 0, torch.arange(2))
        layers = decoder_layers(model)
        for index in range(6):
            layers[index].mlp.register_forward_hook(partial(note, index))
        went.append(set())
        with _frozen(model, _routers_below(model) if above else set()):
            states(model, ids).square().sum().backward()
        found.append({
            name: p.grad for name, p in model.named_parameters()
            if p.requires_grad and int(name.split(".")[2]) >= model.mod.first_left
        })  # fmt: skip
    assert went == [{0, 1, 2, 3, 4, 5}, {4, 5}]
    whole, above = found
    assert set(whole) == set(above) and any("mod_projections" in name for name in whole)
    for name, slope in whole.items():
        assert slope is not None and slope.abs().max() > 0, name
        largest = float(slope.abs().max())  # the forward without a graph takes another kernel of sdpa
        torch.testing.assert_close(above[name], slope, rtol=0, atol=1e-3 * largest, msg=name)


def test_what_was_published_without_a_teacher_learns_the_text(
    folder: Path, data: Data, tmp_path: Path
) -> None:
    """All weights, by the next token's loss: the model says the text better than before, and rows say so."""
    data.stream[:] = np.tile(np.arange(3, 11), len(data.stream) // 8)
    data.texts["novels"][:] = np.resize(np.arange(3, 11), data.texts["novels"].shape)
    study = Study(folder, "cpu", data, tmp_path / "out", measured=1, timed=2)
    row = study.run("paper-alpha-0.003", replace(PLAN, tokens=40 * 4 * T))
    assert row["loss_by_text"]["novels"] < row["dense_loss_by_text"]["novels"] - 0.5
    curve = [loss for _, loss, _ in row["distillation"]["curve"]]
    assert curve[-1] < curve[0] - 0.5
    assert row["distillation"]["epochs"] == pytest.approx(40 * 4 * T / len(data.stream), abs=1e-3)
    assert set(row["compute_by_text"]) == set(data.texts) and row["compute_asked"] is None
    assert row["latency"]["fast"] and row["latency"]["mod_ms"] > 0 and row["latency"]["token_speedup"] > 0


def test_what_is_below_the_point_of_leaving_stays(folder: Path, data: Data, tmp_path: Path) -> None:
    """Routers there are those of the start; the others and the projections have moved."""
    start = kv_routers(tmp_path)
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2, start=str(start))
    row = study.run("kv+leave-2/3-4x-started-above", PLAN)
    assert row["start"] == {"from": "kv", "tensors": 4 * 6, "threshold": None, "recent": 128}
    (file,) = (tmp_path / "out").glob("added_*/modlab_router.safetensors")
    found, before = load_file(file), load_file(start / "modlab_router.safetensors")
    same = {name: torch.equal(tensor, found[name]) for name, tensor in before.items() if "into" in name}
    assert same == {name: int(name.split(".")[2]) < 4 for name in same}


def test_a_run_can_be_as_long_as_the_clock_says(folder: Path, data: Data, tmp_path: Path) -> None:
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2)
    row = study.run("leave-2/3", replace(PLAN, tokens=4 * T), seconds=0.5)
    assert row["tokens"] > 0 and row["distillation"]["seconds"] > 0


def test_distillation_lowers_the_divergence(folder: Path, data: Data, tmp_path: Path) -> None:
    study = Study(folder, "cpu", data, tmp_path / "out", measured=2)
    plan = replace(PLAN, tokens=30 * 4 * T)
    curve = study.run("leave-1/2", plan)["distillation"]["curve"]
    first, last = (np.mean([kl for _, kl, _ in part]) for part in (curve[:5], curve[-5:]))
    assert last < 0.8 * first


def test_operations_are_those_that_hooks_count() -> None:
    """Multiply-adds of linear maps and scores of a routed prefill against the analytic share."""
    config = tiny_config()
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="prompt"))
    ids = torch.randint(3, 500, (1, 200))

    def count(**asked: int) -> int:
        total = 0

        def hook(module: Any, args: Any, output: Any) -> None:
            nonlocal total
            total += 2 * output.numel() * module.in_features

        maps = [
            m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, torch.nn.Linear)
        ]
        handles = [m.register_forward_hook(hook) for m in maps]
        model(ids, use_cache=False, **asked)
        for handle in handles:
            handle.remove()
        return total

    upper = sum(p.numel() for n, p in model.named_parameters() if "mod_projections.q" in n or ".k_proj" in n)
    assert upper
    with modlab.routing_off(model):
        whole = count()
    each = compute.parts(config, 0)
    assert whole == 200 * 6 * sum(each.values())
    own = 200 * 2 * each["keys"] + 2 * (each["queries"] - each["queries"] / 2)  # copies are no nn.Linear
    ran = count(logits_to_keep=1) + own
    assert ran / whole == pytest.approx(compute.leaving(config, 0, 4), abs=0.005)


def test_shares_of_the_routed_forms() -> None:
    config = tiny_config()
    each = compute.parts(config, 1000)
    whole = sum(each.values())
    assert compute.routed(config, 1000, "mlp", {2: [0.0]}) == pytest.approx(1 - each["mlp"] / whole / 6)
    apart = compute.routed(config, 1000, "sublayers", {2: [0.0, 1.0]})
    assert apart == pytest.approx(1 - each["queries"] / whole / 6)
    assert compute.removed(config, 1000, layers=3) == pytest.approx(0.5)
    for skip in ("written", "mlp", "layer"):
        keep = compute.keep_for(config, 10, skip, 3, 0.85)
        assert compute.routed(config, 10, skip, {i: [keep] for i in range(3)}) == pytest.approx(0.85)


@pytest.mark.parametrize("what", ["layer", "attention"])
def test_removal_is_greedy_and_undone(what: str) -> None:
    model, ids = dense_llama(), torch.randint(3, 500, (2, 30))
    want = states(model, ids)
    chosen = removal.greedy(model, what, 2, ids)
    assert removal.greedy(model, what, 2, ids, chosen[:1]) == chosen
    assert len(set(chosen)) == 2 and all(0 < index < 5 for index in chosen)
    assert torch.equal(states(model, ids), want)
    removal.remove(model, what, chosen)
    ran = []
    for index in chosen:
        decoder_layers(model)[index].register_forward_hook(
            lambda m, args, output: ran.append(torch.equal(args[0], output))
        )
    assert not torch.equal(states(model, ids), want)
    assert ran == [what == "layer"] * 2
    removal.restore(model)
    assert torch.equal(states(model, ids), want)


@pytest.mark.parametrize("skip", ["mlp", "written", "sublayers"])
def test_scored_gates_keep_the_largest_updates(skip: str) -> None:
    """On rows that they were fitted on, the share asked for, and more of what changes much."""
    config = modlab.MoDConfig(skip=skip, layers=[2, 3], router_hidden=4, keep_first=0)
    model = modlab.convert(dense_llama(), config)
    rows = torch.randint(3, 500, (6, 60), generator=torch.Generator().manual_seed(0))
    r2 = start_from_scores(model, rows.split(1), keep=0.5)
    assert len(r2) == (4 if skip == "sublayers" else 2) and all(0 < value <= 1 for value in r2.values())
    norms: dict[int, torch.Tensor] = {}

    def note(index: int):
        def hook(module: Any, args: Any, output: Any) -> None:
            norms[index] = output.float().norm(dim=-1)

        return hook

    hooks = [model.model.layers[i].mlp.register_forward_hook(note(i)) for i in (2, 3)]
    with modlab.routing_off(model):
        states(model, rows)
    for hook in hooks:
        hook.remove()
    with modlab.record_routing(model) as recording:
        states(model, rows)
    keep = torch.stack([recording.steps[0].keep[i] for i in (2, 3)]).float()
    assert keep.mean().item() == pytest.approx(0.5, abs=0.15)
    if skip == "mlp":
        size = torch.stack([norms[i] for i in (2, 3)])
        assert size[keep.bool()].mean() > size[~keep.bool()].mean()


def test_tasks_are_compared_item_by_item(tmp_path: Path) -> None:
    rows = [{"query": "w1 w2", "choices": [" w3", " w4"], "gold": i % 2} for i in range(6)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lambada_test.jsonl").write_text(json.dumps({"text": "w1 w2 w3"}))
    found = tasks.right(dense_llama(), make_tokenizer(), tmp_path, 5)
    assert {name: len(value) for name, value in found.items()} == {"piqa": 5, "lambada": 1}
    assert found["piqa"].sum() in (2, 3), "one answer is right every other time"
    other = {"piqa": 1 - found["piqa"]}
    scored = tasks.paired({"piqa": found["piqa"]}, other)
    assert scored["piqa"]["gap"] == pytest.approx(found["piqa"].mean() - other["piqa"].mean())
    assert scored["mean"]["score"] == scored["piqa"]["score"]


def test_problems_are_compared_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, behind: int, limit: int, batch: int) -> dict[str, Any]:
        return {"scores": {f"humaneval behind {behind:,}": [1.0, 0.0, 1.0][:limit]}}

    monkeypatch.setattr(tasks.humaneval, "measure", measured)
    found = tasks.written(dense_llama(), make_tokenizer(), tmp_path, problems=3)
    assert found["humaneval"].tolist() == [1, 0, 1]
    scored = tasks.paired(found, {"humaneval": np.array([1, 1, 1])})
    assert scored["humaneval"]["gap"] == pytest.approx(-1 / 3)


def test_a_prompt_is_timed_and_reported(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["--device", "cpu", "--out", str(out), "--commit", "0" * 40]
    main(["prefill", "--model", str(folder), "--lengths", "40", "--repeats", "2", *common])
    main(["report", "--runs", str(out), "--out", str(tmp_path / "depth.json")])
    record = json.loads((tmp_path / "depth.json").read_text())
    assert record["what"] == "depth"
    assert [row["skip"] for row in record["prefill"]] == ["kv", "prompt", "kv+prompt"]
    for row in record["prefill"]:
        assert row["fast"] and row["speedup"] > 0 and row["dense_by"] and row["routing"] == "drawn"
        assert row["ideal"] > 1 or row["skip"] == "kv", "so short a prompt is all recent"
        assert "mod_token_ms" not in row
    assert str(tmp_path) not in record["command"], "paths of a machine are not published"


def test_trained_routers_decide_about_real_text(folder: Path, data: Data, tmp_path: Path) -> None:
    """Their saving is had from what the cache allocates, and tokens after the first are timed too."""
    data.save(tmp_path / "tok")
    kv_routers(tmp_path, Trained(savings={2.0: 0.4, 8.0: 0.6}, recent={2.0: 16, 8.0: 4}))
    words = ["prefill", "--model", str(folder), "--lengths", "400", "--repeats", "1", "--decode", "3"]
    words += ["--routers", str(tmp_path / "kv"), "--device", "cpu", "--commit", "0" * 40]
    words += ["--out", str(tmp_path)]
    with pytest.raises(modlab.ModlabError, match="give --data too"):
        main(words)
    main([*words, "--data", str(tmp_path / "tok")])
    rows = {
        row["skip"]: row for row in map(json.loads, (tmp_path / "prefill.jsonl").read_text().splitlines())
    }
    for skip, row in rows.items():
        assert row["routing"] == "trained" and row["fast"] and row["mod_token_ms"] > 0
        assert (row["ratio"] > 1.1) == (skip != "prompt") and (row["keep_ratio"] == 1) == (skip == "prompt")


def test_an_arm_starts_at_the_saving_that_it_aims_at(tmp_path: Path) -> None:
    """With its threshold and its recent tokens, not those that the routers were saved with."""
    source = str(kv_routers(tmp_path, Trained(savings={2.0: 0.2, 8.0: 0.8}, recent={2.0: 16, 8.0: 4})))
    fields: dict[str, Any] = {"layers": "all", "gates": "kv_head", "router_hidden": 16}
    model = modlab.convert(dense_llama(), modlab.MoDConfig(skip="kv+prompt", **fields))
    facts = start(model, source, 4.0)
    assert facts["recent"] == model.mod.config.keep_recent == 8
    assert facts["threshold"] == pytest.approx(0.5) and set(model.mod.thresholds.values()) == {
        facts["threshold"]
    }


def test_classes_of_tokens_lose_each_their_own(folder: Path, data: Data, tmp_path: Path) -> None:
    data.save(tmp_path / "tok")
    routers = kv_routers(tmp_path)
    words = ["classes", "--model", str(folder), "--routers", str(routers), "--data", str(tmp_path / "tok")]
    words += ["--texts", "python,novels", "--device", "cpu", "--commit", "0" * 40, "--out", str(tmp_path)]
    main(words)
    record = json.loads((tmp_path / "classes.json").read_text())
    assert record["what"] == "classes" and (record["model"], record["routers"]) == ("tiny", "kv")
    for name in ("python", "novels"):
        rows = [row for row in record["rows"] if row["text"] == name]
        assert sum(row["tokens"] for row in rows) == 2 * (T - 1)
        for row in rows:
            assert 0 <= row["kept"] <= 1 and row["kl"] >= -1e-6
            assert row["loss_excess"] == pytest.approx(row["loss"] - row["dense_loss"], abs=1e-3)


def test_a_prompt_is_taken_apart(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = ["--device", "cpu", "--out", str(out), "--commit", "0" * 40]
    main(["profile", "--model", str(folder), "--lengths", "40", *common])
    rows = [json.loads(line) for line in (out / "profile.jsonl").read_text().splitlines()]
    assert [row["call"] for row in rows] == ["dense", "without", "kv", "prompt", "kv+prompt"]
    assert all(row["ms"] > 0 and row["kernels"][0]["ms"] >= row["kernels"][-1]["ms"] for row in rows)
    assert "aten::" in capsys.readouterr().out


def test_busy_time_counts_overlaps_once() -> None:
    assert _covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "arm": arm, "arm_fields": {"mod": {"skip": skip, "leave_after": 0.66667}}}
        for arm, skip in (("leave-2/3", "prompt"), ("kv+leave-2/3-4x", "kv+prompt"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    time = {"model": "m", "leave_after": 2 / 3, "skip": "prompt", "speedup": 1.5}
    both = time | {"skip": "kv+prompt", "speedup": 2.5}
    trained = both | {"routing": "trained"}  # rather than drawn ones, in any order
    times = [trained, both | {"routing": "drawn", "speedup": 9.0}, time]
    (tmp_path / "prefill.jsonl").write_text("\n".join(map(json.dumps, times)) + "\n")
    assert [row["prefill_speedup"] for row in result([tmp_path], ORIGIN)["rows"]] == [1.5, 2.5]
    with pytest.raises(modlab.ModlabError, match="commit"):
        result([tmp_path], {**ORIGIN, "commit": ""})
    with pytest.raises(modlab.ModlabError, match="no rows.jsonl"):
        result([tmp_path / "nothing"], ORIGIN)


def test_arms_are_convertible() -> None:
    for arm in ARMS.values():
        if not arm.removes:
            modlab.MoDConfig(**arm.mod)
    with pytest.raises(modlab.ModlabError, match="no arm is called 'x'"):
        arm_named("x")
    assert isinstance(dense_llama(), LlamaForCausalLM)
