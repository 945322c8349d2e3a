"""The report of convertible model types: the promised ones work, and the check behind it can say no."""

import re
from pathlib import Path
from typing import Any

import pytest

import modlab
from modlab.cache.layer import RaggedLayer
from modlab.errors import ModlabError
from modlab.execution import packed
from modlab.families import proof
from modlab.families import support as families
from modlab.families.proof import FreshProcess
from modlab.families.tiny_models import every_kind, tiny_model
from modlab.routing.state import Routing
from modlab.saving import routers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_report_has_one_row_a_type_and_a_reason_for_each_refusal() -> None:
    report = families.report(["gpt2", "mamba"], progress=False)
    assert list(report.columns) == ["model_type", "class_name", "supported", "reason"]
    assert report.values.tolist() == [
        ["gpt2", "GPT2LMHeadModel", True, ""],
        [
            "mamba",
            "MambaForCausalLM",
            False,
            "MambaForCausalLM has no routable layers: it has no softmax attention.",
        ],
    ]


def test_the_page_lists_the_promised_types_with_their_classes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    part = text.split("<!-- made: supported -->")[1].split("<!-- end: supported -->")[0]
    listed = re.findall(r"^\| `([\w.-]+)` \| (\w+) \|$", part, re.M)
    classes = families.causal_types()
    assert sorted(listed) == [(name, classes[name]) for name in sorted(families.REQUIRED)]


def test_tiny_configs_are_tiny_and_keep_the_types_own_features() -> None:
    model = tiny_model("gemma2")
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model.config.num_hidden_layers == 4
    assert model.config.final_logit_softcapping  # a feature of the type, not of the sizes
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert not model.training


def test_tiny_models_are_the_same_every_time() -> None:
    first, second = (tiny_model("llama").state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_tiny_models_have_every_kind_of_layer() -> None:
    assert every_kind(["a", "a", "b", "a", "c"], 4) == ["a", "a", "b", "c"]
    assert every_kind(["a", "a", "a", "b", "c"], 4) == ["a", "a", "b", "c"]
    assert every_kind(["a", "b", "c", "d", "e"], 4) == ["a", "b", "c", "d"]
    assert every_kind(["a", "b"], 4) == ["a", "b"]


# The proof can say no: one mutation for each claim, on the type that has least to go wrong.


def refusal(fresh: FreshProcess) -> str:
    return families.why_not("llama", fresh)


def test_layers_that_ignore_the_routing_are_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    """Layers that keep every token whatever the routing says would pass a check of open gates alone."""
    decide = Routing.decide

    def keep_all(*args: Any, **kwargs: Any) -> Any:
        decision = decide(*args, **kwargs)
        decision.keep = decision.keep | True
        return decision

    monkeypatch.setattr(Routing, "decide", keep_all)
    assert refusal(fresh).startswith("skipping tokens does not change the logits")


def test_a_conversion_that_changes_the_model_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = modlab.convert
    paper = modlab.MoDConfig.paper(layers="all")
    monkeypatch.setattr(modlab, "convert", lambda model, config: real(model, paper))
    assert refusal(fresh).startswith("conversion changes the logits")


def test_a_packed_mask_that_hides_too_little_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = packed.visible_mask
    monkeypatch.setattr(packed, "visible_mask", lambda *args: real(*args) | True)
    assert "differ" in refusal(fresh)


def test_a_cache_that_holds_more_than_kept_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = RaggedLayer.rearrange

    def roomy(self: Any, rows: Any, capacities: Any = None, device: Any = None, room: bool = True) -> None:
        real(self, rows, capacities and [n + 64 for n in capacities], device, room)

    monkeypatch.setattr(RaggedLayer, "rearrange", roomy)
    assert re.search(r"cache layer 0: \d+ tokens of \d+ bytes each take \d+ bytes", refusal(fresh))


def test_a_cache_that_mixes_tokens_up_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = RaggedLayer.write
    flip = lambda self, rows, keys, values: real(self, rows, keys.flip(2), values)  # noqa: E731
    monkeypatch.setattr(RaggedLayer, "write", flip)
    assert "differs from the" in refusal(fresh)


def test_routers_that_are_not_saved_are_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = routers.save_file
    lose = lambda state, *rest: real({name: t * 0 for name, t in state.items()}, *rest)  # noqa: E731
    monkeypatch.setattr(routers, "save_file", lose)
    assert refusal(fresh).startswith("reloaded in a fresh process: logits differ")


def test_a_revert_that_leaves_something_behind_is_noticed(monkeypatch: pytest.MonkeyPatch, fresh) -> None:
    real = modlab.revert

    def careless(model: Any) -> Any:
        next(model.parameters()).data[5] += 1e-6
        return real(model)

    monkeypatch.setattr(modlab, "revert", careless)
    assert refusal(fresh)


def test_unknown_type_is_an_error_that_names_it() -> None:
    with pytest.raises(ModlabError, match=r"no causal LM type 'lama'"):
        families.report(["llama", "lama"], progress=False)


def test_one_broken_type_does_not_stop_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    real = proof.tiny_model

    def broken(model_type: str) -> Any:
        if model_type == "qwen2":
            raise RuntimeError("out of\ncheese")
        return real(model_type)

    monkeypatch.setattr(proof, "tiny_model", broken)
    report = families.report(["llama", "qwen2", "gpt2"], progress=False)
    assert list(report.supported) == [True, False, True]
    assert report.reason[1] == "no tiny model of it works: RuntimeError: out of"
