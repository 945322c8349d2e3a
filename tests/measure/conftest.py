"""What the tests of this folder measure: a routed model, and random rows."""

import pytest
import torch

import modlab
from tests.helpers.models import alternate_layers
from tests.measure.models import VOCAB, dense_model, spread_gates


@pytest.fixture
def model():
    return spread_gates(modlab.convert(dense_model(), alternate_layers()))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCAB, (2, 100), generator=generator) for _ in range(3)]
