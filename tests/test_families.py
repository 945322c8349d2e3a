"""The report of convertible model types: the promised ones work, and the check behind it can say no."""

import re
from pathlib import Path
from typing import Any

import pytest

import modlab
from modlab import families
from modlab.errors import ModlabError

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def required() -> Any:
    return families.report(families.REQUIRED, progress=False)


def test_every_promised_type_converts(required: Any) -> None:
    assert list(required.columns) == ["model_type", "class_name", "supported", "reason"]
    assert list(required.model_type) == list(families.REQUIRED)
    failed = required[~required.supported]
    assert failed.empty, failed.to_string()
    assert set(required.reason) == {""}


def test_readme_lists_the_promised_types_with_their_classes(required: Any) -> None:
    text = README.read_text(encoding="utf-8")
    part = text.split("<!-- supported:begin -->")[1].split("<!-- supported:end -->")[0]
    table = part.split("<details>")[0]
    listed = dict(re.findall(r"^\| `([\w.-]+)` \| (\w+) \|$", table, re.M))
    works = required[required.supported]
    assert listed == dict(zip(works.model_type, works.class_name, strict=True))


def test_tiny_configs_are_tiny_and_keep_the_types_own_features() -> None:
    model = families.tiny_model("gemma2")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.num_hidden_layers == 6
    assert model.config.final_logit_softcapping  # a feature of the type, not of the sizes
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert not model.training


def test_tiny_models_are_the_same_every_time() -> None:
    first, second = (families.tiny_model("llama").state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_a_type_without_attention_is_refused_with_a_reason() -> None:
    (row,) = families.report(["mamba"], progress=False).itertuples()
    assert not row.supported
    assert "no routable layers" in row.reason and "\n" not in row.reason


def test_a_conversion_whose_layers_ignore_the_routing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that keep every token whatever the routing says would pass a check of open gates alone."""
    real = modlab.convert

    def deaf(model: Any) -> Any:
        decide = real(model).mod.decide

        def keep_all(*args: Any, **kwargs: Any) -> Any:
            decision = decide(*args, **kwargs)
            decision.keep = decision.keep | True
            return decision

        model.mod.decide = keep_all
        return model

    monkeypatch.setattr(modlab, "convert", deaf)
    assert families.why_not("llama").startswith("skipping tokens does not change the logits")


def test_a_conversion_that_changes_the_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = modlab.convert
    monkeypatch.setattr(modlab, "convert", lambda model: real(model, modlab.MoDConfig.paper()))
    assert families.why_not("llama").startswith("conversion changes the model")


def test_unknown_type_is_an_error_that_names_it() -> None:
    with pytest.raises(ModlabError, match=r"no causal LM type 'lama'"):
        families.report(["llama", "lama"], progress=False)


def test_one_broken_type_does_not_stop_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    real = families.tiny_model

    def broken(model_type: str) -> Any:
        if model_type == "qwen2":
            raise RuntimeError("out of\ncheese")
        return real(model_type)

    monkeypatch.setattr(families, "tiny_model", broken)
    report = families.report(["llama", "qwen2", "gpt2"], progress=False)
    assert list(report.supported) == [True, False, True]
    assert report.reason[1] == "no tiny model could be built: RuntimeError: out of"
