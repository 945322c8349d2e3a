"""A damaged or hostile trace is refused by ModlabError, before it takes memory or time."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest

from modlab import ModlabError, RoutingTrace
from modlab.traces import trace_file


@pytest.fixture
def trace() -> RoutingTrace:
    gate = np.random.default_rng(0).uniform(0, 1, (2, 5)).astype(np.float32)
    return RoutingTrace(
        tokens=["a", "b", "c", "d", "e"],
        token_ids=np.arange(5),
        gate=gate,
        keep=gate >= 0.5,
        layers=[1, 3],
        num_layers=4,
        thresholds=np.full(2, 0.5, np.float32),
        keep_first=1,
        loss=np.ones(5, np.float32),
        kv_bytes_per_token=128,
        model="m",
    )


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def rewrite(path, changes: dict[str, bytes | None], meta: dict[str, Any] | None = None) -> None:
    """Another archive at `path`: with other members, or another description."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if meta is not None:
        described = np.load(io.BytesIO(members["meta.npy"])).tobytes()
        text = json.dumps(json.loads(described) | meta).encode()
        members["meta.npy"] = npy(np.frombuffer(text, np.uint8))
    members |= changes
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def test_it_comes_back(trace, tmp_path) -> None:
    again = RoutingTrace.load(trace.save(tmp_path / "t.npz"))
    assert again.tokens == trace.tokens and np.array_equal(again.gate, trace.gate)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate.npy": None},
        {"meta.npy": None},
        {"gate.npy": b""},
        {"gate.npy": b"junk"},
        {"gate.npy": npy(np.full((2, 5), np.nan, np.float32))},
        {"gate.npy": npy(np.full((2, 5), 1.5, np.float32))},
        {"gate.npy": npy(np.zeros((2, 5), np.int64))},
        {"gate.npy": npy(np.zeros((2, 5)))},
        {"gate.npy": npy(np.zeros((5, 2), np.float32))},
        {"gate.npy": npy(np.zeros((2, 5), np.float32, order="F"))},
        {"gate.npy": npy(np.array([{}], dtype=object))},
        {"keep.npy": npy(np.zeros((2, 5), np.uint8))},
        {"thresholds.npy": npy(np.array([0.5, np.nan], np.float32))},
        {"token_ids.npy": npy(np.arange(5.0))},
        {"meta.npy": npy(np.frombuffer(b"[" * 100_000, np.uint8))},
        {"meta.npy": npy(np.frombuffer(b"[]", np.uint8))},
        {"meta.npy": npy(np.frombuffer(b'{"tokens": NaN}', np.uint8))},
    ],
)
def test_other_arrays_are_refused(trace, tmp_path, changes) -> None:
    rewrite(trace.save(tmp_path / "t.npz"), changes)
    with pytest.raises(ModlabError, match="not a routing trace, or it is damaged"):
        RoutingTrace.load(tmp_path / "t.npz")


@pytest.mark.parametrize(
    "meta",
    [
        {"num_layers": 2},
        {"num_layers": True},
        {"num_layers": 4.0},
        {"num_layers": 10**30},
        {"layers": [3, 1]},
        {"layers": [1, 1]},
        {"layers": [1.0, 3.0]},
        {"layers": [1, 10**9]},
        {"layers": "13"},
        {"tokens": "abcde"},
        {"tokens": [1, 2, 3, 4, 5]},
        {"keep_first": -1},
        {"keep_first": None},
        {"keep_recent": 1.5},
        {"kv_bytes_per_token": "128"},
        {"stored_bytes_per_token": "72"},
        {"stored_bytes_per_token": -1},
        {"model": 3},
        {"skip": "everything"},
        {"skip": ["kv"]},
    ],
)
def test_other_descriptions_are_refused(trace, tmp_path, meta) -> None:
    rewrite(trace.save(tmp_path / "t.npz"), {}, meta)
    with pytest.raises(ModlabError, match="not a routing trace, or it is damaged"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_a_hundred_million_layers_are_not_counted_one_by_one(trace, tmp_path) -> None:
    """They are allowed: a trace of so deep a model would be drawn as any other."""
    rewrite(trace.save(tmp_path / "t.npz"), {}, {"num_layers": 10**8})
    assert RoutingTrace.load(tmp_path / "t.npz").num_layers == 10**8


def nothing_is_unpacked(monkeypatch) -> None:
    def read(*_: object) -> bytes:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "read", read)


def test_a_zip_bomb_is_not_unpacked(trace, tmp_path, monkeypatch) -> None:
    header = npy(np.zeros((1,), np.float32))[:128]
    rewrite(trace.save(tmp_path / "t.npz"), {"gate.npy": header + b"\0" * (2**28 + 1)})
    assert (tmp_path / "t.npz").stat().st_size < 2**20
    nothing_is_unpacked(monkeypatch)
    with pytest.raises(ModlabError, match="more than any trace"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_an_array_that_claims_to_be_larger_than_it_is_takes_no_memory(trace, tmp_path, monkeypatch) -> None:
    header = npy(np.zeros((2, 5), np.float32)).replace(b"(2, 5), }", b"(200000, 500000), }"[:9] + b"")
    claimed = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claimed, {"descr": "<f4", "fortran_order": False, "shape": (2 * 10**5, 5 * 10**5)}
    )
    rewrite(trace.save(tmp_path / "t.npz"), {"gate.npy": claimed.getvalue() + header[-40:]})

    def allocate(*_: object, **__: object) -> None:
        raise AssertionError("memory was taken for it")

    monkeypatch.setattr(np, "ndarray", allocate)
    with pytest.raises(ModlabError, match="shape"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_an_archive_of_many_files_is_not_listed(trace, tmp_path, monkeypatch) -> None:
    trace.save(tmp_path / "t.npz")
    rewrite(tmp_path / "t.npz", {f"more{i}": b"" for i in range(2_000)})
    nothing_is_unpacked(monkeypatch)
    with pytest.raises(ModlabError, match="it lists files in"):
        RoutingTrace.load(tmp_path / "t.npz")


def test_one_flipped_bit_anywhere_is_refused_or_harmless(trace, tmp_path) -> None:
    whole = trace.save(tmp_path / "t.npz").read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        (tmp_path / "t.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            again = RoutingTrace.load(tmp_path / "t.npz")
        except ModlabError:
            refused += 1
        else:
            assert again.tokens == trace.tokens and np.array_equal(again.gate, trace.gate)
    assert refused > len(whole) / 6


def test_what_could_not_be_loaded_is_not_saved(trace, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trace_file, "LARGEST", 100)
    with pytest.raises(ModlabError, match="save it in parts"):
        trace.save(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())
