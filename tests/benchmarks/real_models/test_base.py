"""The base as plain tensors is the model of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.real_models import base as bases
from benchmarks.real_models.base import Base
from benchmarks.real_models.decoder import dense_hidden, hard_hidden
from benchmarks.real_models.divergence import logits
from benchmarks.real_models.gates import GateForm, Gates
from modlab.errors import ModlabError


def test_it_says_what_transformers_says(folder: Path, base: Base) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(base.shape.V, (2, 70))
    with torch.no_grad():
        theirs = model(ids).logits
        mine = logits(dense_hidden(base, ids).flatten(0, 1), base.head_VD).view_as(theirs)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_with_every_key_kept_routing_changes_nothing(base: Base) -> None:
    gates = Gates(base.shape, GateForm())
    gates.threshold = -100.0
    ids = torch.randint(base.shape.V, (2, 200))
    torch.testing.assert_close(
        hard_hidden(base, gates, ids, 64)[0], dense_hidden(base, ids), rtol=1e-4, atol=1e-4
    )


def test_with_no_key_kept_a_token_sees_the_window_and_the_first_tokens(base: Base) -> None:
    gates = Gates(base.shape, GateForm(first=4))
    gates.threshold = 100.0
    ids = torch.randint(base.shape.V, (1, 200))
    other = ids.clone()
    other[0, 10:40] = (ids[0, 10:40] + 1) % base.shape.V  # 2 layers of 64 tokens reach 128 back from 199
    one, two = (hard_hidden(base, gates, x, 64)[0][0, -1] for x in (ids, other))
    torch.testing.assert_close(one, two)
    other[0, 0] = (ids[0, 0] + 1) % base.shape.V
    assert not torch.allclose(one, hard_hidden(base, gates, other, 64)[0][0, -1])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModlabError, match=r"neither config\.json nor one \.gguf"):
        bases.load(tmp_path)
