"""LoRA of the real PEFT on a converted model: routers learn, travel and merge with the adapters."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modlab
from modlab.errors import ModlabError
from modlab.integrations.peft import load_adapter, lora_config, save_adapter
from modlab.integrations.trainer import MoDCallback
from tests.helpers.models import scatter_gates
from tests.helpers.tokenizers import make_tokenizer

peft = pytest.importorskip("peft")

ROWS = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(make_llama, tmp_path):
    """A dense model as users have it: a folder, with a tokenizer."""
    make_llama(num_hidden_layers=4).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def converted(base):
    config = modlab.MoDConfig(skip="layer", layers=[1, 2])
    return modlab.convert(AutoModelForCausalLM.from_pretrained(base), config)


def adapted(base):
    model = converted(base)
    return peft.get_peft_model(model, lora_config(model, r=4))


def trainable(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_modlab(model, folder) -> None:
    config = modlab.TrainConfig(steps=4, batch_size=8, lr=1e-2, keep_ratio=0.3, ramp=0.0)
    modlab.train(model, ROWS, config)


def by_trainer(model, folder) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})
    trainer = Trainer(model, args, train_dataset=data, callbacks=[MoDCallback(keep_ratio=0.3, ramp=0.0)])
    trainer.train()
    assert trainer.state.log_history[0]["routing_objective"] > 0.1


@pytest.mark.parametrize("how", [by_modlab, by_trainer])
def test_adapters_and_routers_learn_and_come_back(base, tmp_path, how) -> None:
    model = adapted(base)
    names = set(trainable(model))
    assert sum("mod_router" in n for n in names) == 4 and all(
        "mod_router" in n or "lora_" in n for n in names
    )
    before, frozen = trainable(model), {n: p.clone() for n, p in model.named_parameters() if n not in names}
    how(model, tmp_path / "run")
    for name, parameter in trainable(model).items():
        assert not torch.equal(parameter, before[name]), name
    for name, parameter in frozen.items():
        assert torch.equal(model.get_parameter(name), parameter), name

    scatter_gates(model)  # routes that differ from token to token
    thresholds = {1: 0.5, 2: 0.499}
    modlab.set_threshold(model, thresholds)
    logits = model.eval()(ROWS[:2]).logits
    save_adapter(model, tmp_path / "adapter")
    again, tokenizer = modlab.load(tmp_path / "adapter")
    assert torch.equal(again(ROWS[:2]).logits, logits)
    assert again.mod.thresholds == thresholds and tokenizer("the router")["input_ids"]
    with modlab.record_routing(again) as recording:
        again(ROWS[:2])
    kept = torch.stack(list(recording.steps[0].keep.values())).float().mean()
    assert 0.2 < kept < 0.8

    fresh = peft.PeftModel.from_pretrained(converted(base), str(tmp_path / "adapter")).eval()
    modlab.set_threshold(fresh, thresholds)
    assert torch.equal(fresh(ROWS[:2]).logits, logits)


def test_merged_model_is_converted_and_computes_the_same(base, tmp_path) -> None:
    model = adapted(base)
    by_modlab(model, tmp_path)
    scatter_gates(model)
    with torch.no_grad():
        logits = model(ROWS[:2]).logits
        generated = model.generate(input_ids=ROWS[:2, :9], max_new_tokens=6, pad_token_id=0)
        merged = model.merge_and_unload()
        assert modlab.is_converted(merged) and type(merged).__name__ == "LlamaForCausalLM"
        torch.testing.assert_close(merged(ROWS[:2]).logits, logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(merged.generate(ROWS[:2, :9], max_new_tokens=6, pad_token_id=0), generated)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(ROWS[:2]).logits, merged(ROWS[:2]).logits)
    assert not any("router" in name for name, _ in modlab.revert(merged).named_parameters())


def test_a_checkpoint_of_the_trainer_loads(base, tmp_path) -> None:
    model = adapted(base)
    by_trainer(model, tmp_path)
    again, _ = modlab.load(tmp_path / "checkpoint-4")
    torch.testing.assert_close(again(ROWS[:2]).logits, model.eval()(ROWS[:2]).logits)


def test_a_base_that_was_saved_converted_needs_no_description(base, tmp_path) -> None:
    converted(base).save_pretrained(tmp_path / "mod")
    make_tokenizer().save_pretrained(tmp_path / "mod")
    base_model, _ = modlab.load(tmp_path / "mod")
    model = peft.get_peft_model(base_model, lora_config(base_model, r=4, init_lora_weights=False))
    scatter_gates(model)
    model.save_pretrained(tmp_path / "adapter")
    again, _ = modlab.load(tmp_path / "adapter")
    assert torch.equal(again(ROWS[:2]).logits, model.eval()(ROWS[:2]).logits)
    moved = (tmp_path / "mod").rename(tmp_path / "moved")
    with pytest.raises(ModlabError, match="neither a local folder|is not a folder|holds no"):
        modlab.load(tmp_path / "adapter")
    again, _ = load_adapter(tmp_path / "adapter", base=moved)
    assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)


PLAIN = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False}


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_routers_travel_with_a_plain_config(base, tmp_path, wrapped) -> None:
    """PEFT's own config and its own `save_pretrained`: nothing is lost, whoever trains or saves."""
    model = converted(base)
    scatter_gates(model)
    modlab.set_threshold(model, {1: 0.4, 2: 0.55})
    model = peft.get_peft_model(model, peft.LoraConfig(**PLAIN)).eval()
    (torch.nn.Sequential(model)[0] if wrapped else model).save_pretrained(tmp_path / "adapter")
    again, _ = modlab.load(tmp_path / "adapter")
    assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)
    assert again.get_base_model().mod.thresholds == {1: 0.4, 2: 0.55}
    (tmp_path / "adapter" / "modlab_router.safetensors").unlink()
    with pytest.raises(ModlabError, match="no modlab_router.safetensors"):
        modlab.load(tmp_path / "adapter")


@torch.no_grad()
def test_routers_travel_with_each_of_several_adapters(base, tmp_path) -> None:
    model = scatter_gates(converted(base))
    model = peft.get_peft_model(model, peft.LoraConfig(**PLAIN)).eval()
    model.add_adapter("second", peft.LoraConfig(**PLAIN | {"r": 2}))
    model.save_pretrained(tmp_path / "both")
    for name, folder in (("default", "both"), ("second", "both/second")):
        model.set_adapter(name)
        again, _ = modlab.load(tmp_path / folder)
        assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)
    model.save_pretrained(tmp_path / "alone", selected_adapters=["second"])
    again, _ = modlab.load(tmp_path / "alone" / "second")
    assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "adaption prompts": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("skip", ["kv", "layer"])
def test_routers_travel_with_learned_prompts_or_it_says_so(base, tmp_path, kind, skip) -> None:
    dense = AutoModelForCausalLM.from_pretrained(base)
    config = modlab.MoDConfig(skip=skip, layers="all", keep_recent=3, keep_first=1)
    model = peft.get_peft_model(scatter_gates(modlab.convert(dense, config)), PROMPTS[kind]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "mod_router" not in name:
                parameter.add_(0.1)
        want = model(input_ids=ROWS, use_cache=False).logits
        with pytest.warns(UserWarning, match="save_adapter"):
            model.save_pretrained(tmp_path / "by PEFT")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_adapter(model, tmp_path / "by modlab")
        loaded, _ = modlab.load(tmp_path / "by modlab")
        assert torch.equal(loaded(input_ids=ROWS, use_cache=False).logits, want)


def test_a_prefix_of_keys_is_refused(base) -> None:
    """PEFT hands them over in a dense cache, in which no router has decided."""
    dense = AutoModelForCausalLM.from_pretrained(base)
    model = modlab.convert(dense, modlab.MoDConfig(layers="all", keep_recent=3))
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ModlabError, match="DynamicCache"):
        model(input_ids=ROWS)


def test_checkpoints_of_a_trainer_that_knows_nothing_of_routers(base, tmp_path) -> None:
    """No callback, a plain config: the adapters are trained, the routers stay, both come back."""
    model = peft.get_peft_model(scatter_gates(converted(base)), peft.LoraConfig(**PLAIN))
    data = Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()})
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, args, train_dataset=data).train()
    again, _ = modlab.load(tmp_path / "checkpoint-2")
    torch.testing.assert_close(again(ROWS[:2]).logits, model.eval()(ROWS[:2]).logits)


def test_a_config_is_an_ordinary_one_elsewhere(base, make_llama, tmp_path) -> None:
    """Copies of it, and a dense model that was given the same, know nothing of the first model."""
    config = peft.LoraConfig(**PLAIN)
    model = peft.get_peft_model(converted(base), config)
    model.save_pretrained(tmp_path / "routed")
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is peft.LoraConfig and copied.to_dict() == config.to_dict()
    dense = peft.get_peft_model(make_llama(num_hidden_layers=4), config)
    dense.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "modlab_config.json").exists()
    modlab.revert(model.unload())
    config.save_pretrained(tmp_path / "reverted")
    assert [path.name for path in (tmp_path / "reverted").iterdir()] == ["adapter_config.json"]


@torch.no_grad()
def test_folders_of_other_things_are_not_mixed_with_adapters(base, tmp_path) -> None:
    """Neither a model, nor routers alone, nor adapters that brought their routers in another file."""
    plain = peft.get_peft_model(scatter_gates(converted(base)), peft.LoraConfig(**PLAIN)).eval()
    trained = peft.get_peft_model(
        modlab.convert(
            AutoModelForCausalLM.from_pretrained(base), modlab.MoDConfig(skip="layer", layers=[0])
        ),
        peft.LoraConfig(**PLAIN, modules_to_save=["mod_router"]),
    ).eval()
    for save in (save_adapter, lambda model, folder: model.save_pretrained(folder)):
        for model in (plain, trained):
            save(model, tmp_path / "adapter")
            again, _ = modlab.load(tmp_path / "adapter")
            assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)
    with pytest.raises(ModlabError, match="holds adapters"):
        modlab.save_routers(converted(base), tmp_path / "adapter", base_model=base)
    routed = scatter_gates(converted(base))
    routed.save_pretrained(tmp_path / "mod")
    make_tokenizer().save_pretrained(tmp_path / "mod")
    ours = {path.name: path.read_bytes() for path in (tmp_path / "mod").glob("modlab*")}
    with pytest.raises(ModlabError, match="holds a model"):
        save_adapter(trained, tmp_path / "mod")
    trained.save_pretrained(tmp_path / "mod")  # PEFT does as it is told
    assert {path.name: path.read_bytes() for path in (tmp_path / "mod").glob("modlab*")} == ours


def test_a_model_with_adapters_is_not_saved_under_changed_names(base, tmp_path) -> None:
    """Its weights would load as random ones."""
    model = adapted(base)
    with pytest.raises(ModlabError, match="carries PEFT adapters"):
        model.get_base_model().save_pretrained(tmp_path / "x")
    for routed in (model, model.get_base_model()):
        with pytest.raises(ModlabError, match="carries PEFT adapters.*save_adapter"):
            modlab.save_routers(routed, tmp_path / "x", base_model=base)
    assert not (tmp_path / "x").exists()


@torch.no_grad()
def test_adapters_that_transformers_put_on(base, tmp_path, monkeypatch) -> None:
    """`model.add_adapter`: transformers saves the adapters alone."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = scatter_gates(converted(base)).eval()
    model.add_adapter(peft.LoraConfig(**PLAIN | {"target_modules": ["q_proj"]}))
    model.save_pretrained(tmp_path / "adapter")
    again, _ = modlab.load(tmp_path / "adapter")
    assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)
    adapters = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    for state in (adapters, {}):
        with pytest.raises(ModlabError, match="state_dict given"):
            model.save_pretrained(tmp_path / "adapter", state_dict=state)
    again, _ = modlab.load(tmp_path / "adapter")  # still there
    assert torch.equal(again(ROWS[:2]).logits, model(ROWS[:2]).logits)


@pytest.mark.parametrize(
    "damage",
    [
        {"adapter_config.json": b"{"},
        {"adapter_config.json": b"[]"},
        {"adapter_config.json": b'{"base_model_name_or_path": 3}'},
        {"adapter_model.safetensors": b"junk"},
        {"adapter_model.safetensors": None},
        {"modlab_config.json": b"null"},
    ],
)
def test_damaged_adapters_are_refused(base, tmp_path, damage) -> None:
    save_adapter(adapted(base), tmp_path / "adapter")
    for name, content in damage.items():
        (tmp_path / "adapter" / name).unlink()
        if content is not None:
            (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(ModlabError):
        modlab.load(tmp_path / "adapter")


def forget_description(folder) -> None:
    """The folder as PEFT alone would have written it."""
    (folder / "modlab_config.json").unlink()


def test_routers_without_a_word_on_routed_layers_are_refused(base, tmp_path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    forget_description(tmp_path / "adapter")
    with pytest.raises(ModlabError, match="save_adapter"):
        modlab.load(tmp_path / "adapter")


def test_without_peft_the_error_says_what_to_install(base, tmp_path, monkeypatch) -> None:
    save_adapter(adapted(base), tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModlabError, match=r"pip install 'modlab\[peft\]'"):
        modlab.load(tmp_path / "adapter")


def test_order_of_convert_adapt_and_revert(base, make_llama) -> None:
    with pytest.raises(ModlabError, match="dense"):
        lora_config(make_llama())
    dense = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ModlabError, match="before it gets adapters"):
        modlab.convert(dense)
    with pytest.raises(ModlabError, match="merge_and_unload"):
        modlab.revert(adapted(base))


def test_frozen_routers_are_refused_by_the_trainer(base, tmp_path) -> None:
    model = peft.get_peft_model(converted(base), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ModlabError, match="lora_config"):
        by_trainer(model, tmp_path)


@pytest.mark.parametrize("excluded", [None, ["o_proj"], r".*\.o_proj"], ids=["none", "names", "pattern"])
@pytest.mark.parametrize(("skip", "rank"), [("prompt", 0), ("kv+prompt", 0), ("kv+prompt", 2)])
def test_no_adapter_is_left_uncalled(make_llama, skip, rank, excluded) -> None:
    """Above the point of leaving copies of the projections run in the place of the base's."""
    base = modlab.convert(make_llama(), modlab.MoDConfig(skip=skip, leave_rank=rank, keep_recent=8))
    settings = {} if excluded is None else {"exclude_modules": excluded}
    model = peft.get_peft_model(base, lora_config(base, r=2, **settings)).train()
    ids = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in learning.items() if grad is None] == []
    assert any("q_proj.lora_A" in name for name in learning)
    assert any("o_proj.lora_A" in name for name in learning) is (excluded is None)


def test_adapters_in_the_way_of_leaving_are_named_as_such(make_llama) -> None:
    peft.get_peft_model(base := make_llama(num_hidden_layers=4), peft.LoraConfig(**PLAIN))
    with pytest.raises(ModlabError, match="carry adapters.*leave_rank"):
        modlab.convert(base, modlab.MoDConfig(skip="prompt"))
    assert modlab.is_converted(modlab.convert(base, modlab.MoDConfig(skip="prompt", leave_rank=2)))


@pytest.mark.parametrize("routers_of_peft", [False, True])
def test_a_state_without_routers_is_refused(base, tmp_path, routers_of_peft) -> None:
    """The adapters' alone, or what a process other than the first holds; a folder that lies there stays."""
    extra = {"modules_to_save": ["mod_router"]} if routers_of_peft else {}
    model = peft.get_peft_model(scatter_gates(converted(base)), peft.LoraConfig(**PLAIN, **extra)).eval()
    whole = dict(model.state_dict())
    save_adapter(model, tmp_path / "adapter", state_dict=whole)
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(ModlabError, match="state_dict given is empty"):
        save_adapter(model, tmp_path / "adapter", state_dict={})
    if not routers_of_peft:
        alone = {name: tensor for name, tensor in whole.items() if "lora_" in name}
        with pytest.raises(ModlabError, match=r"lacks 4 tensors .*layers\.1\.mod_router"):
            save_adapter(model, tmp_path / "adapter", state_dict=alone)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_the_state_of_learned_prompts_has_other_names(base, tmp_path) -> None:
    model = peft.get_peft_model(scatter_gates(converted(base)), PROMPTS["prompt tuning"]()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = dict(model.state_dict())
    save_adapter(model, tmp_path / "adapter", state_dict=whole)
    loaded, _ = modlab.load(tmp_path / "adapter")
    want = model(input_ids=ROWS[:2], use_cache=False).logits
    assert torch.equal(loaded(input_ids=ROWS[:2], use_cache=False).logits, want)


@pytest.mark.parametrize(("part", "refused"), [("base_layer", False), ("lora_A", True), ("mod_router", True)])
def test_parts_of_the_base_are_no_parts_of_adapters(base, tmp_path, part, refused) -> None:
    """Tensor parallelism cuts up the base, and leaves adapters and routers whole."""
    model = peft.get_peft_model(scatter_gates(converted(base)), peft.LoraConfig(**PLAIN)).eval()
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.full_tensor = lambda: None  # as a DTensor's
    with pytest.raises(ModlabError, match="holds a part of") if refused else contextlib.nullcontext():
        save_adapter(model, tmp_path / "adapter")
    if not refused:
        loaded, _ = modlab.load(tmp_path / "adapter")
        assert torch.equal(loaded(ROWS[:2]).logits, model(ROWS[:2]).logits)
