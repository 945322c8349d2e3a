"""Recipes by name: settings that fit the model, a saving that is met by arithmetic, flags that win."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest

import modlab
from modlab.cache.stored import keep_ratio_for_saving
from modlab.conversion import ranges
from modlab.errors import ModlabError
from modlab.families.tiny_models import tiny_model
from modlab.recipes import RECIPES, TRAINED

IN_16_BITS = 2 * 16 / (16 + 2)
"""What eight bits save of 16, in heads of 16."""


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_converts_and_trains(make_llama: Any, name: str) -> None:
    import torch

    model = make_llama(num_hidden_layers=8)
    mod_config, train_config = modlab.recipe(name, model, steps=2, batch_size=2, calibrate=False)
    modlab.convert(model, mod_config)
    rows = torch.randint(3, 512, (8, 160), generator=torch.Generator().manual_seed(0))
    assert modlab.train(model, rows, train_config).steps == 2


@pytest.mark.parametrize("name", ["default", "memory", "safe", "distil"])
def test_recipes_of_the_cache_are_what_real_models_were_measured_with(make_llama: Any, name: str) -> None:
    model = make_llama(num_hidden_layers=8)
    mod_config, config = modlab.recipe(name, model, steps=1)
    assert (mod_config.skip, mod_config.layers, mod_config.gates) == ("kv", "all", "kv_head")
    assert (config.objective, config.recent_range, config.router_lr) == ("distil", (128, 1024), 0.004)
    assert mod_config.kv_cache_dtype == ("int8" if name in ("default", "memory") else "auto")
    by_routing = {"default": 6 / IN_16_BITS, "memory": 8 / IN_16_BITS, "safe": 2, "distil": 4}
    assert 1 / config.keep_ratio == pytest.approx(by_routing[name]), "of single precision the same share"
    plain, config = modlab.recipe(name, model, kv_cache_dtype="auto", steps=1)
    assert plain.kv_cache_dtype == "auto"
    assert 1 / config.keep_ratio == pytest.approx({"default": 3, "safe": 2}.get(name, 4))
    for saving in RECIPES[name].kv_savings.values():
        assert f"{saving:g}x" in RECIPES[name].summary


@pytest.mark.parametrize(("saving", "recent", "keep"), [(None, 512, 0.2), (2.0, 1024, 3 / 7)])
def test_speed_from_a_start_is_what_was_measured(
    make_llama: Any, saving: float | None, recent: int, keep: float
) -> None:
    """The arm's settings; 4x counts the recent tokens, as nothing else in the run knows of them."""
    model = make_llama(num_hidden_layers=8, max_position_embeddings=32_768)
    mod_config, config = modlab.recipe("speed", model, kv_saving=saving, started=True, tokens=10**7)
    assert (mod_config.skip, mod_config.keep_recent) == ("kv+prompt", recent)
    assert config.keep_ratio == pytest.approx(keep, abs=1e-3)
    assert (config.lr, config.router_lr, config.ramp, config.freeze_below) == (5e-4, 2e-3, 0.0, True)
    assert config.batch_size * 4096 == 16_384 and config.keep_range is config.recent_range is None
    mod_config, config = modlab.recipe("speed", model, tokens=10**7)
    assert (config.router_lr, config.ramp, config.freeze_below) == (0.01, 0.7, False)
    assert mod_config.keep_recent == modlab.MoDConfig().keep_recent
    assert modlab.recipe("distil", model, started=True, steps=1)[1].ramp == 0
    with pytest.raises(ModlabError, match="fits routers itself: leave started=True out"):
        modlab.recipe("quick", model, started=True)


def test_the_plain_form_is_no_recipe() -> None:
    assert modlab.MoDConfig() == modlab.MoDConfig(layers="inner", gates="layer")
    assert modlab.TrainConfig().objective == "auto"


@pytest.mark.parametrize("fitted", [True, False])
def test_the_default_works_on_a_small_model_in_rows_shorter_than_its_recent_tokens(fitted: bool) -> None:
    import torch

    model, _ = modlab.load("demo-dense")
    mod_config, config = modlab.recipe("default", model, steps=2, batch_size=2)
    modlab.convert(model, mod_config)
    rows = torch.randint(3, 4000, (8, 96), generator=torch.Generator().manual_seed(0))
    if fitted:
        modlab.fit_routers(model, rows, modlab.FitConfig(tokens=768, context=96), progress=False)
    assert modlab.train(model, rows, config).steps == 2
    trained = model.mod.trained
    assert (
        trained is not None and {2.0, 4.0} <= set(trained.savings) and trained.method.startswith("distilled")
    )
    assert model.mod.config.kv_cache_dtype == "int8"
    assert model.mod.config.keep_recent == trained.recent_for(6 / (2 * 32 / 34)) <= trained.seq_len // 4
    assert trained.recent[4.0] < model.mod.config.keep_recent < trained.recent[3.0]
    text = rows[:1].repeat(1, 12)  # longer than what stays anyway: something is left out
    with modlab.KVTracker(model) as kv:
        model.generate(text, max_new_tokens=2, do_sample=False)
    assert kv.summary()["kv_saving"] > 1


@pytest.mark.parametrize(
    ("name", "saving"), [("memory", 2.5), ("layers", 1.5), ("default", 1.7), ("default", 3)]
)
def test_the_keep_ratio_gives_the_saving(make_llama: Any, name: str, saving: float) -> None:
    model = make_llama(num_hidden_layers=8)
    dtype: Any = "auto"
    mod_config, train_config = modlab.recipe(name, model, kv_saving=saving, kv_cache_dtype=dtype, steps=1)
    routed = len(mod_config.resolve_layers(8))
    assert 8 / (8 - routed + routed * train_config.keep_ratio) == pytest.approx(saving)


def test_the_quick_recipe_fits(make_llama: Any) -> None:
    import torch

    model = make_llama(num_hidden_layers=4)
    mod_config, fit_config = modlab.recipe("quick", model, kv_saving=2, context=160)
    assert (mod_config.layers, mod_config.gates, fit_config.keep_ratio) == ("all", "kv_head", 0.5)
    rows = torch.randint(3, 512, (8, 160), generator=torch.Generator().manual_seed(0))
    found = modlab.fit_routers(modlab.convert(model, mod_config), rows, fit_config, progress=False)
    assert found.keep_ratio == pytest.approx(0.5, abs=0.011)


def test_latent_heads_get_a_gate_a_layer() -> None:
    from modlab.families.tiny_models import tiny_model

    config, _ = modlab.recipe("quick", tiny_model("deepseek_v3"))
    assert (config.gates, config.layers, config.router_hidden) == ("layer", "all", 16)


def test_what_is_given_wins(make_llama: Any) -> None:
    model = make_llama(num_hidden_layers=8)
    _, config = modlab.recipe("memory", model, steps=7, keep_ratio=0.6, ramp=0.5)
    assert (config.steps, config.keep_ratio, config.ramp) == (7, 0.6, 0.5)
    assert modlab.recipe("memory", model, steps=7)[0].skip == "kv"


def test_refusals_say_what_to_do(make_llama: Any) -> None:
    model = make_llama(num_hidden_layers=8)
    with pytest.raises(ModlabError, match="no recipe 'fast': choose one of quick, distil, safe, default"):
        modlab.recipe("fast", model, steps=1)
    with pytest.raises(ModlabError, match="5 of 8 layers are routed, which saves less than 2.67x"):
        modlab.recipe("layers", model, steps=1, kv_saving=2.8)
    with pytest.raises(ModlabError, match="'default' distils, and objective='target' is another way"):
        modlab.recipe("default", model, steps=1, objective="target")
    with pytest.raises(ModlabError, match="alpha decides it"):
        modlab.recipe("paper", model, steps=1, kv_saving=1.5)
    with pytest.raises(ModlabError, match="has to be above 1"):
        keep_ratio_for_saving(0.9, 4, 8)
    with pytest.raises(ModlabError, match="say the same"):
        modlab.recipe("memory", model, steps=1, kv_saving=1.5, keep_ratio=0.5)
    with pytest.raises(ModlabError, match="has to be above 1"):
        modlab.recipe("memory", model, steps=1, kv_saving=0)
    with pytest.raises(ModlabError, match="How long to train"):
        modlab.recipe("memory", model)


def test_a_converted_model_is_told_so(tiny_llama) -> None:
    with pytest.raises(ModlabError, match="is converted already, and a recipe is for a dense model"):
        modlab.recipe("default", tiny_llama)


@pytest.mark.parametrize("name", ["default", "memory", "safe"])
def test_where_windows_leave_few_layers_the_aim_is_what_they_can_save(name: str) -> None:
    model = tiny_model("gemma2")  # half of its layers hold a window alone
    with pytest.warns(UserWarning, match=rf"the recipe {name!r} aims at 1.75x here"):
        mod, train = modlab.recipe(name, model, steps=1)
    modlab.convert(model, mod)
    assert 0 < train.keep_ratio < 0.5
    with pytest.raises(ModlabError, match="saves less than 2.00x"):
        modlab.recipe(name, tiny_model("gemma2"), kv_saving=4, steps=1)


@pytest.mark.parametrize("name", ["distil", "quick"])
def test_eight_bits_save_on_top_where_a_recipe_was_not_measured_with_them(make_llama: Any, name: str) -> None:
    model, steps = make_llama(num_hidden_layers=8), {} if name == "quick" else {"steps": 1}
    plain, own = (modlab.recipe(name, model, kv_cache_dtype=dtype, **steps) for dtype in (None, "int8"))
    assert plain[1] == own[1]
    assert (plain[0].kv_cache_dtype, own[0].kv_cache_dtype) == ("auto", "int8")


@pytest.mark.parametrize("name", ["default", "quick"])
def test_a_saving_that_is_asked_for_is_that_of_both(make_llama: Any, name: str) -> None:
    model, steps = make_llama(num_hidden_layers=8), {} if name == "quick" else {"steps": 1}
    factor = 4 * 16 / (16 + 2)  # of single precision, in heads of 16
    both = modlab.recipe(name, model, kv_cache_dtype="int8", kv_saving=8.0, **steps)
    assert 1 / both[1].keep_ratio == pytest.approx(8 / factor)
    with pytest.raises(ModlabError, match=r"eight bits alone save 3\.56x, which leaves nothing to routing"):
        modlab.recipe(name, model, kv_cache_dtype="int8", kv_saving=3.5, **steps)
    fewer = modlab.recipe(name, model, kv_cache_dtype="k6v4", kv_saving=16.0, **steps)
    assert fewer[0].kv_cache_dtype == "k6v4"
    assert 1 / fewer[1].keep_ratio == pytest.approx(16 * (12 + 8 + 2 * 2) / (2 * 16 * 4))


@pytest.mark.parametrize(("saving", "dtype"), [(1.5, "auto"), (2.5, "auto"), (2.7, "int8"), (4.0, "int8")])
def test_of_a_small_saving_eight_bits_would_leave_routing_nothing(
    make_llama: Any, saving: float, dtype: str
) -> None:
    """2.67x in heads of 16, of which routing has 1.5x, as `keep_range` has it; warned of, met without."""
    model = make_llama(num_hidden_layers=8).bfloat16()
    expected = pytest.warns(UserWarning, match=r"eight bits alone save 1\.78x, which leaves less to routing")
    with expected if dtype == "auto" else contextlib.nullcontext():
        mod_config, config = modlab.recipe("default", model, kv_saving=saving, steps=1)
    assert mod_config.kv_cache_dtype == dtype
    assert 1 / config.keep_ratio == pytest.approx(saving / (IN_16_BITS if dtype == "int8" else 1))


@pytest.mark.parametrize(("name", "saving"), [("default", 3), ("memory", 4)])
def test_a_model_that_cannot_have_eight_bits_is_aimed_at_what_it_can(
    make_llama: Any, monkeypatch: pytest.MonkeyPatch, name: str, saving: float
) -> None:
    """As with tensor parallelism, whose heads are shared across ranks."""
    model = make_llama(num_hidden_layers=8)
    monkeypatch.setattr(ranges, "mesh_of", lambda model: "a mesh")
    with pytest.warns(UserWarning, match="which this model cannot have: .*are shared across ranks"):
        mod_config, config = modlab.recipe(name, model, steps=1)
    assert mod_config.kv_cache_dtype == "auto" and 1 / config.keep_ratio == pytest.approx(saving)
    assert modlab.convert(model, mod_config).mod.layers == list(range(8))
    modlab.revert(model)
    with pytest.raises(ModlabError, match="are shared across ranks"):
        modlab.recipe(name, model, kv_cache_dtype="int8", steps=1)
    assert not modlab.is_converted(model)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "roberta", "bamba"])
def test_eight_bits_need_no_plain_cache_of_the_dense_model(model_type: str) -> None:
    """Keys of other widths than values, a cache with one for an encoder next to it, recurrent layers."""
    model = tiny_model(model_type)
    config, _ = modlab.recipe("default", model, steps=1)
    assert config.kv_cache_dtype == "int8" and modlab.convert(model, config).mod.ranges


def test_a_recipe_leaves_the_model_as_it_was(make_llama: Any) -> None:
    import torch

    model = make_llama(num_hidden_layers=8).train()
    modules, kind, state = dict(model.named_modules()), type(model), copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    modlab.recipe("default", model, steps=1)
    assert torch.equal(before, torch.get_rng_state()) and type(model) is kind and model.training
    assert dict(model.named_modules()) == modules and not modlab.is_converted(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_where_one_layer_of_nine_is_not_routed_the_aim_stays_within_what_is_trained() -> None:
    """8x lies below the 9x that skipping everything would give, and asks gates for next to nothing."""
    kinds = ["full_attention"] * 8 + ["sliding_attention"]
    model = tiny_model("gemma3_text", num_hidden_layers=9, layer_types=kinds)
    with pytest.warns(UserWarning, match=r"8 of 9 layers .* less than 9x: .* aims at 7x here instead of 8x"):
        _, config = modlab.recipe("memory", model, steps=1)
    assert config.keep_range is not None and config.keep_ratio > config.keep_range[0]


def test_what_a_run_in_eight_bits_leaves_is_known_by_routing_alone(make_llama: Any) -> None:
    import torch

    model = make_llama(num_hidden_layers=8)
    mod_config, config = modlab.recipe("distil", model, kv_cache_dtype="int8", steps=2, batch_size=2)
    modlab.convert(model, mod_config)
    modlab.train(model, torch.randint(3, 512, (8, 160), generator=torch.Generator().manual_seed(0)), config)
    trained = model.mod.trained
    assert set(trained.savings) == {2.0, 3.0, 4.0, 8.0}
    assert set(model.mod.thresholds.values()) == {trained.savings[4.0]}, "as without eight bits"
    assert model.mod.config.keep_recent == trained.recent[4.0]


def test_layers_as_a_whole_have_no_keys_to_round(make_llama: Any) -> None:
    with pytest.raises(ModlabError, match="kv_cache_dtype means nothing there"):
        modlab.recipe("layers", make_llama(), kv_cache_dtype="int8", steps=1)


def test_a_recipe_leaves_fast_generation_on(make_llama: Any) -> None:
    model = make_llama().eval()
    modlab.enable_fast_generation(model, compile=False)
    with pytest.raises(ModlabError, match="steps"):
        modlab.recipe("default", model)  # refused before anything is tried
    engine = model.__dict__["mod_engine"]
    modlab.recipe("default", model, steps=1)
    assert modlab.fast_generation_report(model)["enabled"] and model.__dict__["mod_engine"] is not engine
    assert not modlab.is_converted(model)
