"""The frozen base: weights of a Llama or Qwen2 folder as plain tensors, and its layers in two halves.

A layer is cut where attention sits: `before` makes queries, keys and values, `after` takes what attention
read and runs the MLP. Both halves are compiled once and serve all layers, as the weights are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modlab.errors import ModlabError


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the names are the shape letters of the package."""

    L: int
    D: int
    N: int
    G: int
    H: int
    V: int
    eps: float
    theta: float
    context: int


class Layer(NamedTuple):
    """Weights of one layer, projections of the same input joined."""

    norm1_D: Tensor
    qkv: Tensor  # [(N + 2G)H, D]
    qkv_bias: Tensor
    o: Tensor  # [D, NH]
    norm2_D: Tensor
    gate_up: Tensor  # [2I, D]
    down: Tensor  # [D, I]


@dataclass
class Base:
    """A frozen decoder. `head_VD` may be the same tensor as `embedding_VD`."""

    shape: Shape
    layers: list[Layer]
    embedding_VD: Tensor
    norm_D: Tensor
    head_VD: Tensor

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    def embed(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.embedding_VD)

    def last_norm(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.norm_D, self.shape.eps)

    def rotation(self, T: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [T, H] in fp32."""
        H, device = self.shape.H, self.device
        speed = self.shape.theta ** (-torch.arange(0, H, 2, device=device, dtype=torch.float32) / H)
        angle = torch.outer(torch.arange(T, device=device, dtype=torch.float32), speed)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Base:
    """Reads a folder with a Hugging Face model or with one .gguf file.

    Raises:
        ModlabError: the model is not of a type that this study runs.
    """
    config, weights = _read(folder)
    kind = config["model_type"]
    if kind not in ("llama", "qwen2"):
        raise ModlabError(f"{folder} holds a {kind!r} model; this study runs 'llama' and 'qwen2'.")
    D, N = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    shape = Shape(
        L=config["num_hidden_layers"], D=D, N=N, G=config["num_key_value_heads"],
        H=config.get("head_dim") or D // N, V=config["vocab_size"], eps=config["rms_norm_eps"],
        theta=rope.get("rope_theta", 10000.0), context=config["max_position_embeddings"],
    )  # fmt: skip

    def get(name: str) -> Tensor:
        return weights[name].to(device, dtype)

    embedding = get("model.embed_tokens.weight")
    tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in weights
    head = embedding if tied else get("lm_head.weight")
    layers = [_layer(weights, i, shape, get) for i in range(shape.L)]
    return Base(shape, layers, embedding, get("model.norm.weight"), head)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import json

    from safetensors.torch import load_file

    if (folder / "config.json").exists():
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(str(file))
        return json.loads((folder / "config.json").read_text(encoding="utf-8")), weights
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModlabError(f"{folder} holds neither config.json nor one .gguf file; name a model's folder.")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.bfloat16)
    return model.config.to_dict(), model.state_dict()


def _layer(weights: dict[str, Tensor], i: int, shape: Shape, get: Any) -> Layer:
    at = f"model.layers.{i}."
    qkv = [at + f"self_attn.{part}_proj." for part in "qkv"]
    bias = torch.cat(
        [
            get(part + "bias") if part + "bias" in weights else torch.zeros_like(get(part + "weight")[:, 0])
            for part in qkv
        ]
    )
    return Layer(
        get(at + "input_layernorm.weight"),
        torch.cat([get(part + "weight") for part in qkv]),
        bias,
        get(at + "self_attn.o_proj.weight"),
        get(at + "post_attention_layernorm.weight"),
        torch.cat([get(at + "mlp.gate_proj.weight"), get(at + "mlp.up_proj.weight")]),
        get(at + "mlp.down_proj.weight"),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32, as the models do."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def before(
    x_BTD: Tensor, layer: Layer, cos_TH: Tensor, sin_TH: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, N, H], keys and values [B, T, G, H]; positions turned in."""
    B, T, _ = x_BTD.shape
    qkv = F.linear(rms_norm(x_BTD, layer.norm1_D, shape.eps), layer.qkv, layer.qkv_bias)
    q, k, v = qkv.view(B, T, -1, shape.H).split([shape.N, shape.G, shape.G], 2)
    cos, sin = cos_TH[None, :, None], sin_TH[None, :, None]
    return _turned(q, cos, sin), _turned(k, cos, sin), v.contiguous()


def _turned(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BTNH.chunk(2, -1)
    return (x_BTNH * cos + torch.cat([-second, first], -1) * sin).to(x_BTNH.dtype)


def after(x_BTD: Tensor, read_BTNH: Tensor, layer: Layer, eps: float) -> Tensor:
    """The layer's output, given what its heads have read."""
    x_BTD = x_BTD + F.linear(read_BTNH.flatten(2), layer.o)
    gate, up = F.linear(rms_norm(x_BTD, layer.norm2_D, eps), layer.gate_up).chunk(2, -1)
    return x_BTD + F.linear(F.silu(gate) * up, layer.down)
