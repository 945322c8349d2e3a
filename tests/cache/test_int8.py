"""Eight bits a number: what is rounded, by how much, and that channels of very different size survive."""

from __future__ import annotations

import pytest
import torch

from modlab.cache.int8 import Int8Range


def keys_and_values(tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, tokens, 32), torch.randn(1, 2, tokens, 16)
    keys[..., 3] = 100 + keys[..., 3]  # as a bias does
    keys[..., 5] *= 1e-3
    return keys, 0.01 * values


@pytest.fixture
def ranges() -> Int8Range:
    ranges = Int8Range(2, 32, 16)
    ranges.measure(*keys_and_values())
    return ranges


def test_every_channel_is_within_a_step_of_its_own_size(ranges: Int8Range) -> None:
    keys, values = keys_and_values()
    seen_keys, seen_values = ranges.rounded(keys, values)
    spread = keys.std(2, keepdim=True)
    assert ((seen_keys - keys).abs() / spread).max() < 0.04  # 3.3 / 127 / 2, by up to root two
    assert ((seen_values - values).abs() / values.std(2, keepdim=True)).max() < 0.04


def test_without_a_range_large_channels_drown_the_others() -> None:
    keys, values = keys_and_values()
    seen_keys, _ = Int8Range(2, 32, 16).rounded(keys, values)
    assert ((seen_keys - keys).abs() / keys.std(2, keepdim=True)).max() > 0.3


def test_zeros_and_single_tokens_are_finite(ranges: Int8Range) -> None:
    for values in (torch.zeros(1, 2, 1, 16), torch.full((1, 2, 1, 16), 1e-30)):
        codes, steps = ranges.encode_values(values)
        assert not codes.any() and steps.isfinite().all()
        assert not ranges.decode_values(codes, steps, torch.float32).any()


def test_what_a_token_becomes_does_not_depend_on_its_neighbours(ranges: Int8Range) -> None:
    keys, values = keys_and_values()
    whole, one = ranges.rounded(keys, values), ranges.rounded(keys[:, :, 7:8], values[:, :, 7:8])
    for seen, alone in zip(whole, one, strict=True):
        torch.testing.assert_close(seen[:, :, 7:8], alone, rtol=0, atol=0)


def test_it_stays_in_single_precision(ranges: Int8Range) -> None:
    assert ranges.to(torch.bfloat16).key_step.dtype == torch.float32


def test_bytes_a_token(ranges: Int8Range) -> None:
    codes, steps = ranges.encode_keys(keys_and_values()[0])
    assert codes.dtype == torch.int8 and steps.element_size() == 2 and steps.shape == (1, 2, 64, 1)


def test_a_wave_is_coded_by_its_peaks() -> None:
    """What rotation makes of a bias: were its usual size the step, it would have half as many codes."""
    torch.manual_seed(0)
    keys = torch.randn(16, 1, 32, 32)
    keys[..., 0] += 100 * torch.rand(16, 1, 32).mul(6.28).sin()
    ranges = Int8Range(1, 32, 32)
    ranges.measure(keys, keys)
    seen, _ = ranges.rounded(keys, keys)
    assert (seen - keys)[..., 0].abs().max() < 0.8  # by its usual size .9
    assert (seen - keys)[..., 1:].abs().max() < 0.05


@pytest.mark.parametrize("size", [1e6, 1e30])
def test_numbers_beyond_the_largest_step_end_at_their_largest_code(ranges: Int8Range, size: float) -> None:
    codes, steps = ranges.encode_values(torch.full((1, 2, 1, 16), size))
    assert (codes == 127).all() and (32 * steps.float()).max() <= torch.finfo(torch.float16).max
    assert ranges.decode_values(codes, steps, torch.float32).isfinite().all()


def test_it_is_made_again_from_the_meta_device(ranges: Int8Range) -> None:
    assert ranges.to("meta").to_empty(device="cpu").key_step.device.type == "cpu"
