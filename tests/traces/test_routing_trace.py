"""RoutingTrace: figures, files and pictures; trace: what it records of a real forward."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modlab
from modlab.data.pieces import encode
from modlab.errors import ModlabError
from modlab.hf.names import given_cache
from modlab.traces.routing_trace import RoutingTrace
from modlab.traces.run import run_traced
from tests.helpers.models import scatter_gates
from tests.helpers.tokenizers import make_tokenizer
from tests.helpers.traces import make_trace

TEXT = "the router decides which token runs, 日本 🙂 and which one skips it\n  twice. "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    scatter_gates(tiny_llama)
    return tiny_llama


def test_saving_is_over_all_layers() -> None:
    keep = np.zeros((2, 8), dtype=bool)
    keep[0, :4] = True  # one half and nothing of two routed layers, four layers in all
    trace = make_trace(8, 4, keep=keep)
    assert trace.keep_ratio.tolist() == [0.5, 0.0]
    assert trace.kv_saving == pytest.approx(4 / (1 + 1 + 0.5 + 0))
    assert make_trace(8, 4, keep=keep, skip="mlp").kv_saving == 1.0  # K and V stay


def test_preview_honours_the_first_tokens_and_takes_one_p_a_layer() -> None:
    trace = make_trace(40, 6)
    assert np.array_equal(trace.preview_keep(0.5), trace.keep)
    each = trace.preview_keep([0.2, 0.5, 0.9])
    for row, p in enumerate((0.2, 0.5, 0.9)):
        assert np.array_equal(each[row], trace.preview_keep(p)[row])
        assert each[row, :4].all()
    assert trace.preview_saving(0.9) > trace.kv_saving > trace.preview_saving(0.1)


@pytest.mark.parametrize("p", [1.0, -1, float("nan"), [0.5, 0.5], [0.1, 0.2, 1.5]])
def test_preview_refuses_what_is_no_threshold(p: Any) -> None:
    with pytest.raises(ModlabError, match="at least 0 and below 1|one p or 3"):
        make_trace(10, 6).preview_keep(p)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"gate": np.zeros((2, 7))}, "gate has shape"),
        ({"layers": [3, 1]}, "ascend"),
        ({"layers": [1, 4]}, "ascend"),
        ({"layers": [1, 1]}, "more than once.*one gate a layer"),
        ({"layers": [], "gate": np.zeros((0, 8)), "keep": np.zeros((0, 8)), "thresholds": []}, "0 layers"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModlabError, match=says):
        make_trace(8, 4, **changes)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_npz_round_trip(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.just("end\x00")
    tokens = data.draw(st.lists(any_text, min_size=1, max_size=12))
    layers = data.draw(st.integers(2, 9))
    seed = data.draw(st.integers(0, 99))
    trace = make_trace(len(tokens), layers, seed=seed, tokens=tokens, skip="attention")
    again = RoutingTrace.load(trace.save(tmp_path_factory.mktemp("npz") / "any name"))
    for name in ("tokens", "layers", "num_layers", "keep_first", "kv_bytes_per_token", "model", "skip"):
        assert getattr(again, name) == getattr(trace, name)
    for name in ("token_ids", "gate", "keep", "thresholds", "loss"):
        before, after = getattr(trace, name), getattr(again, name)
        assert before.dtype == after.dtype and np.array_equal(before, after, equal_nan=name == "loss")


def test_what_a_routed_layer_stores_is_saved_and_is_all_of_it_in_older_files(tmp_path: Path) -> None:
    trace = make_trace(20, skip="kv", stored_bytes_per_token=132)
    assert trace.kv_bytes_per_token == 512 and trace.kv_cache_dtype == "int8"
    assert RoutingTrace.load(trace.save(tmp_path / "new.npz")).stored_bytes_per_token == 132
    old = make_trace(20, skip="kv")
    assert old.kv_cache_dtype == "auto" and old.stored_bytes_per_token == 512
    fewer = make_trace(20, skip="kv", stored_bytes_per_token=100, kv_cache_dtype="k6v4")
    assert RoutingTrace.load(fewer.save(tmp_path / "fewer.npz")).kv_cache_dtype == "k6v4"
    assert trace.kv_saving > old.kv_saving and trace.preview_saving(0.0) == 6 / (3 + 3 * 132 / 512)
    path = old.save(tmp_path / "old.npz")
    with np.load(path) as held:
        arrays = dict(held)
    meta = json.loads(bytes(arrays["meta"]))
    del meta["stored_bytes_per_token"], meta["kv_cache_dtype"]
    np.savez(path, **{**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)})
    assert RoutingTrace.load(path).stored_bytes_per_token == 512


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_trace(10).save(tmp_path / "a.npz")
    before = path.read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        make_trace(20).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_loading_something_else(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match="no file"):
        RoutingTrace.load(tmp_path / "absent.npz")
    whole = make_trace(50).save(tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("not a trace")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "pickled.npy", "cut.npz", "text.npz", "empty.npz"):
        with pytest.raises(ModlabError, match="not a routing trace"):
            RoutingTrace.load(tmp_path / name)


def test_a_skip_that_nobody_knows_is_named(tmp_path: Path) -> None:
    """A trace of a newer modlab, or of a skip of one's own that is not imported here."""
    trace = make_trace(20)
    object.__setattr__(trace, "skip", "sideways")
    path = trace.save(tmp_path / "a.npz")
    with pytest.raises(ModlabError, match=r"a\.npz.*'sideways'.*kv"):
        RoutingTrace.load(path)


def test_trace_records_what_the_model_did(model: Any, tokenizer: Any) -> None:
    modlab.set_threshold(model, {1: 0.4, 3: 0.5, 5: 0.6})
    trace, output = run_traced(model, tokenizer, TEXT)
    cache = given_cache(output)
    ids = torch.tensor([trace.token_ids.tolist()])
    assert ids[0].tolist() == tokenizer(TEXT)["input_ids"] and trace.text == TEXT
    assert (trace.layers, trace.num_layers, trace.keep_first) == ([1, 3, 5], 6, 4)
    assert trace.thresholds.tolist() == pytest.approx([0.4, 0.5, 0.6])
    # Decisions, loss and saving agree with the model, its own loss, and the cache it filled.
    assert np.array_equal(trace.preview_keep(trace.thresholds), trace.keep)
    assert 0 < trace.keep.mean() < 1
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert trace.mean_loss == pytest.approx(loss, rel=1e-5) and np.isnan(trace.loss[0])
    stored = cache.kept_tokens[:, 0]
    assert stored[[1, 3, 5]].tolist() == trace.keep.sum(1).tolist()
    assert trace.kv_saving == pytest.approx(6 * len(trace.tokens) / stored.sum().item())
    assert trace.kv_bytes_per_token * 6 * len(trace.tokens) == cache.dense_nbytes


def test_preview_is_exact_for_the_first_routed_layer_only(model: Any, tokenizer: Any) -> None:
    modlab.set_threshold(model, 0.3)
    low = modlab.trace(model, tokenizer, TEXT)
    modlab.set_threshold(model, 0.7)
    high = modlab.trace(model, tokenizer, TEXT)
    assert np.array_equal(low.preview_keep(0.7)[0], high.keep[0])  # nothing before it depends on p
    assert not np.allclose(low.gate[1:], high.gate[1:])  # why a preview is only a preview


def test_trace_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    frozen = model.model.layers[0].eval()
    before = dict(model.mod.thresholds)
    modlab.trace(model, tokenizer, TEXT)
    assert model.training and model.lm_head.training and not frozen.training
    assert model.mod.thresholds == before
    assert all(p.grad is None for p in model.parameters())


def test_one_token(model: Any, tokenizer: Any) -> None:
    trace = modlab.trace(model, tokenizer, "a")
    assert trace.tokens == ["a"] and np.isnan(trace.mean_loss) and trace.kv_saving == 1.0
    assert "1 tokens" in repr(trace) and "<svg" in trace.to_svg()


def test_errors_say_what_to_do(model: Any, tokenizer: Any, make_llama: Any) -> None:
    with pytest.raises(ModlabError, match=r"modlab\.convert"):
        modlab.trace(make_llama(), tokenizer, TEXT)
    with pytest.raises(ModlabError, match="empty"):
        modlab.trace(model, tokenizer, "")
    with pytest.raises(ModlabError, match="3,000 tokens.*at most 2,048"):
        modlab.trace(model, tokenizer, "日" * 1000)  # three bytes each, no merges


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_pieces_join_to_the_text(text: str, tokenizer: Any) -> None:
    ids, pieces = encode(tokenizer, text)
    assert "".join(pieces) == text and len(pieces) == len(ids)


def test_special_tokens_and_trimmed_blanks_keep_the_text_whole(data_dir: Path) -> None:
    from transformers import AutoTokenizer

    folder = data_dir / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "  Once upon a time 🙂\n\nthere was  a dog. "
    ids, pieces = encode(tokenizer, text)
    assert ids[0] == tokenizer.bos_token_id and pieces[0] == ""
    assert "".join(pieces) == text


def test_page_holds_everything_and_asks_nobody() -> None:
    nasty = "</script><script>alert(1)</script><!--"
    html = make_trace(12, tokens=[nasty] + ["x"] * 11).to_html()
    assert nasty not in html
    addresses = set(re.findall(r"https?://[^\"'\s]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which nothing is fetched from
    assert not re.search(r"<link|@import|\bsrc=|url\(", html)
    data = json.loads(re.search(r'id="modlab-data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    assert data["tokens"][0] == nasty and data["can_run"] is False


def test_part_of_a_trace() -> None:
    trace = make_trace(100)
    part = trace.part(2, 40)
    assert part.tokens == trace.tokens[2:40] and part.keep_first == 2 and trace.part(50, 60).keep_first == 0
    assert np.array_equal(part.gate, trace.gate[:, 2:40]) and np.array_equal(part.keep, trace.keep[:, 2:40])
    assert part.mean_loss == pytest.approx(trace.loss[2:40].mean())
    assert len(trace.part(0, 1000).tokens) == 100 and np.isnan(trace.part(0, 1).mean_loss)
    with pytest.raises(ModlabError, match="none of the 100 tokens"):
        trace.part(100, 200)
