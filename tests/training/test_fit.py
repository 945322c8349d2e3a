"""Routers fitted to scores: against a plain computation, for many architectures, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import modlab
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.hf.anatomy import decoder_layers
from modlab.routing.router import normalised
from modlab.routing.trained import Trained
from modlab.training import scores
from modlab.training.contexts import REPEAT, repeated
from modlab.training.fit import fit_routers
from modlab.training.fit_config import FitConfig
from modlab.training.fit_pass import FitPass
from tests.helpers.models import dense_llama
from tests.helpers.tokenizers import make_tokenizer

L, P = 48, 5
HEADS = {"layers": "all", "gates": "kv_head", "router_hidden": 4, "keep_recent": 8}


def lively(**changes: Any) -> Any:
    """A tiny Llama of few tokens, whose attention tells them apart."""
    sizes = {"vocab_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
    return dense_llama(**{**sizes, **changes})


def texts(rows: int, length: int = L) -> Tensor:
    return torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, ids: Tensor, gates: int) -> list[tuple[Tensor, Tensor]]:
    """By layer: the states that it reads [B, L, D] and log scores [B, L, gates], from the eager model's own
    attention weights and projections."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    found = []
    for layer, state, weights in zip(
        model.model.layers, output.hidden_states, output.attentions, strict=False
    ):
        attention, (B, T, D) = layer.self_attn, state.shape
        N, H = weights.shape[1], attention.head_dim
        v = attention.v_proj(layer.input_layernorm(state)).view(B, T, -1, H)
        v = v.repeat_interleave(N // v.shape[2], 2)
        o = attention.o_proj.weight.view(D, N, H)
        sizes = torch.einsum("btnh,dnh->btnd", v, o).norm(dim=-1)[:, :L].transpose(1, 2)
        second = weights[:, :, T - L :, :L] / state[:, None, T - L :, None].norm(dim=-1)
        score = (second.amax(2) * sizes).log().clamp(min=scores.LEAST)
        found.append((state[:, :L], score.view(B, gates, -1, L).amax(2).transpose(1, 2)))
    return found


@pytest.mark.parametrize(("gates", "count"), [("kv_head", 2), ("layer", 1)])
@torch.no_grad()
def test_scores_and_fit_are_those_of_a_plain_computation(gates: Any, count: int) -> None:
    model = lively()
    text, prompt = texts(12), torch.arange(3, 3 + P)
    wanted = by_hand(model, repeated(text, prompt), count)
    modlab.convert(model, modlab.MoDConfig(**(HEADS | {"gates": gates})))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    steps = FitPass(model, prompt, ridge=10.0, hidden_steps=0, sample=1, tokens=1, seed=0)
    steps.first = 0
    steps._run(text, lambda i, x, y: seen.update({i: (x, y)}))
    for i, (state, score) in enumerate(wanted):
        torch.testing.assert_close(seen[i][0], state, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen[i][1], score, rtol=1e-3, atol=1e-3)
    steps.fit(text[:7])
    steps.fit(text[7:])
    steps.solve()
    for layer, (state, score) in zip(decoder_layers(model), wanted, strict=True):
        x = F.pad(normalised(state).flatten(0, 1), (0, 1), value=1.0).double()
        scale = x[:, :-1].square().mean()
        y = score.flatten(0, 1).double()
        held_back = torch.eye(x.shape[1]) * 10.0 * scale
        held_back[-1, -1] = 0.0
        solution = torch.linalg.solve(x.T @ x + held_back, x.T @ y).float()
        z: Any = layer.mod_router(state)
        torch.testing.assert_close(
            z.view(*z.shape[:2], count), F.linear(normalised(state), solution[:-1].T, solution[-1]),
            rtol=1e-2, atol=1e-2,
        )  # fmt: skip


def test_a_fit_explains_held_out_rows_and_keeps_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model = modlab.convert(lively(), modlab.MoDConfig(**HEADS))
    before = {n: p.clone() for n, p in model.named_parameters() if ".mod_" not in n}
    config = FitConfig(keep_ratio=0.3, context=64, tokens=64 * 60, ridge=100.0)
    found = fit_routers(model, texts(60, 64), config)
    assert found.r2 == found.r2_linear > 0.1
    assert found.keep_ratio == pytest.approx(0.3, abs=0.011)
    assert found.tokens == 64 * 52
    assert set(found.keep_ratio_by_layer) == set(model.mod.layers)
    assert set(model.mod.thresholds.values()) == {0.5}
    assert model.mod.base_trained is False
    savings = model.mod.trained.savings
    assert list(savings) == [1.5, 2.0, 3.0, 4.0] and savings[3.0] < 0.6 < 2 * savings[4.0]
    modlab.set_kv_saving(model, 2.0)
    read = {"input_ids": texts(20, 64)}
    length, recent = model.mod.trained.seq_len, model.mod.recent
    assert recent == model.mod.trained.recent[2.0] == length / 2 / 2  # half of what such texts store
    want = (length / 2 - recent) / (length - recent)
    assert modlab.measure.evaluate(model, read, cache=False).keep_ratio == pytest.approx(want, abs=0.05)
    modlab.set_threshold(model, 0.5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert re.search(r"R² 0\.\d{3}", capsys.readouterr().err)
    again = modlab.convert(lively(), modlab.MoDConfig(**HEADS))
    assert fit_routers(again, texts(60, 64), config, progress=False).r2 == found.r2


def test_the_hidden_layer_is_fitted_on_what_is_left() -> None:
    model = modlab.convert(lively(), modlab.MoDConfig(**(HEADS | {"router_hidden": 16})))
    config = FitConfig(context=64, tokens=64 * 60, ridge=100.0, hidden_steps=300)
    found = fit_routers(model, texts(60, 64), config, progress=False)
    assert found.r2 > found.r2_linear + 0.05


@pytest.mark.parametrize("first", [5, 7])
def test_tokens_are_drawn_afresh_from_each_batch(first: int) -> None:
    """Of which the last has another size: where all tokens are sampled, none of them is missing."""
    model = modlab.convert(lively(), modlab.MoDConfig(**HEADS))
    steps = FitPass(model, torch.arange(3, 3 + P), ridge=10.0, hidden_steps=1, sample=9, tokens=9, seed=0)
    text = texts(12)
    for part in (text[:first], text[first:]):
        steps.fit(part)
    for samples in steps.samples.values():
        assert [len(x) for x, _ in samples] == [len(y) for _, y in samples]
        assert [len(x) for x, _ in samples] == [n * (L - steps.first) for n in (first, 12 - first)]


def test_texts_and_a_tokenizer() -> None:
    model = modlab.convert(lively(vocab_size=600), modlab.MoDConfig(**HEADS))
    words = [f"the router decides which token {n} runs and which skips. " * 8 for n in range(20)]
    found = fit_routers(model, words, FitConfig(context=48), tokenizer=make_tokenizer(), progress=False)
    assert found.tokens >= 48 * 10


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    """Of the text, and of what asks for it once more."""
    model = modlab.convert(lively(), modlab.MoDConfig(**HEADS))
    config = FitConfig(context=48)
    with pytest.raises(ModlabError, match="what asks for a text once more .* the model has 48 tokens"):
        fit_routers(model, texts(8), config, tokenizer=make_tokenizer(), progress=False)
    prompt = make_tokenizer()(REPEAT, add_special_tokens=False)["input_ids"]
    model = modlab.convert(lively(vocab_size=max(prompt) + 1), modlab.MoDConfig(**HEADS))
    words = [f"the router decides which token {n} runs and which skips. " * 8 for n in range(20)]
    with pytest.raises(ModlabError, match="the text holds token ids"):
        fit_routers(model, words, config, tokenizer=make_tokenizer(600), progress=False)


KINDS = (
    "gpt2",
    "gpt_neox",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "bloom",
    "falcon",
    "gpt_neo",
    "mixtral",
    "opt",
    "gpt_oss",
)


@pytest.mark.parametrize("model_type", [*KINDS, "deepseek_v3"])
def test_any_architecture(model_type: str) -> None:
    """Other projections, soft caps, windows, biases, sinks, attentions in plain torch, latent keys."""
    model = tiny_model(model_type)
    gates = "layer" if model_type == "deepseek_v3" else "kv_head"
    modlab.convert(model, modlab.MoDConfig(layers="all", gates=gates, keep_recent=4))
    ids = torch.randint(3, 200, (8, 24), generator=torch.Generator().manual_seed(0))
    found = fit_routers(model, ids, FitConfig(context=24, ridge=1.0), progress=False)
    assert found.r2 == found.r2  # a number
    for index in model.mod.layers:
        router: Any = decoder_layers(model)[index].mod_router
        assert router.weight.abs().sum() > 0, index
    assert not any(m._forward_pre_hooks for m in decoder_layers(model)), "hooks are taken away"


def test_the_output_projection_is_found_whatever_its_kind() -> None:
    """Scores with a projection that is a Conv1D, or packed, are those of the same numbers as a Linear."""
    model = tiny_model("gpt2")
    modlab.convert(model, modlab.MoDConfig(layers="all", keep_recent=4))
    found: list[Any] = []
    steps = FitPass(model, torch.arange(2), ridge=1.0, hidden_steps=0, sample=1, tokens=1, seed=0)
    real = scores.OutputProjection.log_size

    def noting(self: Any, *args: Any) -> Tensor:
        found.append(self.gram_NHH)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(scores.OutputProjection, "log_size", noting)
        model.eval()
        steps._run(torch.randint(3, 200, (1, 16)), lambda *_: None)
    for layer, gram in zip(model.transformer.h, found, strict=True):
        o = layer.attn.c_proj.weight.view(gram.shape[0], gram.shape[1], -1)
        torch.testing.assert_close(gram, o @ o.transpose(1, 2))


def test_ctrl_c_leaves_the_routers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modlab.convert(lively(), modlab.MoDConfig(**HEADS))
    modlab.set_threshold(model, 0.3)
    model.mod.trained = known = Trained(savings={2.0: 0.3})
    before = {n: p.clone() for n, p in model.named_parameters()}

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modlab.training.fit._calibrated", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_routers(model, texts(8), FitConfig(context=L), progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(model.mod.thresholds.values()) == {0.3}
    assert model.mod.trained is known


@pytest.mark.parametrize(
    ("mod", "data", "config", "message"),
    [
        (None, texts(8), {}, "modlab.convert"),
        ({"skip": "layer"}, texts(8), {}, 'skip="kv"'),
        ({"skip": "kv+prompt", "layers": "all"}, texts(8), {}, r'from layer 4 on .*objective="distil"'),
        ({"skip": "prompt"}, texts(8), {}, r'no routers.*objective="distil"'),
        (HEADS, texts(1), {"context": L}, "1 texts of 48 tokens"),
        (HEADS, ["a text"], {}, "need a tokenizer"),
        (HEADS, texts(8), {"context": 2000}, "context=2000"),
        (HEADS, texts(8), {"keep_ratio": 0.0}, "keep_ratio=0.0"),
        (HEADS, texts(8), {"seed": -1}, "seed=-1"),
        (HEADS, texts(8), {"ridge": 0.0}, "ridge=0.0"),
        (HEADS, texts(8), {"held_out": 0.9}, "held_out=0.9"),
    ],
)
def test_refusals(mod: dict[str, Any] | None, data: Any, config: dict[str, Any], message: str) -> None:
    model = dense_llama()
    if mod is not None:
        modlab.convert(model, modlab.MoDConfig(**mod))
    with pytest.raises(ModlabError, match=message):
        fit_routers(model, data, FitConfig(**config), progress=False)
