"""One branch of a layer skipped, attention or MLP: every model type does it right, or is refused.

By default a type for each mechanism runs; `--all-families` runs them all.
"""

import re

import pytest
import torch

import modlab
from modlab import families
from modlab.errors import ModlabError
from modlab.layer import RoutedBranch, RoutedMLP
from modlab.ops.reference import masked_execution
from modlab.proof import some_tokens
from modlab.tiny_models import quiet, tiny_model

from .test_every_family import UNSUPPORTED

RESIDUAL = "adds the residual itself"
NO_MLP = "has no mlp module of its own"
BERT_KIN = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
    ),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
    "xmod",
)
CANNOT_SKIP = {
    **{(name, "attention"): RESIDUAL for name in (*BERT_KIN, "bloom")},
    ("bloom", "mlp"): RESIDUAL,
    ("mpt", "mlp"): RESIDUAL,
    ("gpt_neox_japanese", "attention"): "needs what attention returns beside the hidden states",
    ("granitemoehybrid", "mlp"): "has a second MLP",
    ("mllama", "attention"): "does not run where the input is text alone",
    ("mllama", "mlp"): "does not run where the input is text alone",
}
"""(type, branch): a regular expression that the refusal must match. A layer whose MLP is spread over the
layer itself (`NO_MLP`) needs no entry."""

FAST = (
    "llama",
    "gpt2",
    "bloom",
    "mpt",
    "bert",
    "gptj",
    "dbrx",
    "mixtral",
    "llama4_text",
    "gpt_neox_japanese",
    "opt",
)
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
KEPT = 8
"""Tokens before this one keep every branch, the others skip all of them: no token that runs sees one that
skipped."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-families")
        types = [name for name in families.causal_types() if name not in UNSUPPORTED]
        metafunc.parametrize("model_type", [name for name in types if everything or name in FAST])


def first_tokens(layer_idx: int, gate: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return position_ids < KEPT


@torch.no_grad()
@pytest.mark.parametrize("skip", ["attention", "mlp"])
def test_a_branch_is_skipped_or_refused(model_type: str, skip: str) -> None:
    with quiet():
        model = tiny_model(model_type)
        dense = model(IDS, use_cache=False).logits
        try:
            modlab.convert(model, modlab.MoDConfig(skip=skip, layers="all"))
        except ModlabError as error:
            assert re.search(CANNOT_SKIP.get((model_type, skip), NO_MLP), str(error)), error
            assert torch.equal(model(IDS, use_cache=False).logits, dense), "a refusal has changed the model"
            return
        assert (model_type, skip) not in CANNOT_SKIP
        assert torch.equal(model(IDS, use_cache=False).logits, dense)
        scale = dense.abs().max()

        # By hand, with the unrouted model: what the branches say of the last tokens is silenced.
        with modlab.routing_override(model, first_tokens):
            packed = model(IDS, use_cache=False).logits
        names = [
            name for name, module in model.named_modules() if isinstance(module, RoutedBranch | RoutedMLP)
        ]
        assert len(names) == len(model.mod.layers)
        modlab.revert(model)
        hooks = [model.get_submodule(name).register_forward_hook(silence_the_last) for name in names]
        by_hand = model(IDS, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        assert (by_hand - dense).abs().max() > 1e-4 * scale, "skipping changes nothing: no proof"
        assert (packed - by_hand).abs().max() <= 1e-5 * scale

        modlab.convert(model, modlab.MoDConfig(skip=skip, layers="all"))
        with modlab.routing_override(model, some_tokens):
            packed = model(IDS, use_cache=False).logits
            with masked_execution(model):
                masked = model(IDS, use_cache=False).logits
        assert (packed - masked).abs().max() <= 1e-5 * scale


def silence_the_last(_module: torch.nn.Module, _args: object, output: object) -> object:
    """Zeros for the tokens that skip, in whatever shape the branch returns them."""
    out = output[0] if isinstance(output, tuple | list) else output
    tokens = out.view(*IDS.shape, -1) if out.dim() == 2 else out  # Llama 4's experts return one row of tokens
    silent = tokens.clone()
    silent[:, KEPT:] = 0
    silent = silent.view_as(out)
    return type(output)((silent, *output[1:])) if isinstance(output, tuple | list) else silent
