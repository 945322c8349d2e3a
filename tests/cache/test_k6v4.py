"""Keys in six bits and values in four: what is rounded, by how much, and that codes survive their packing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modlab.cache import k6v4
from modlab.cache.int8 import Int8Range
from modlab.cache.k6v4 import K6V4Range
from modlab.errors import ModlabError

SIZES = (4, 8, 12, 64, 96, 128)


def keys_and_values(key_dim: int = 32, value_dim: int = 16, tokens: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, tokens, H, generator=generator) for H in (key_dim, value_dim))
    keys[..., 3] = 100 + keys[..., 3]  # as a bias does
    keys[..., 1] *= 1e-3
    return keys, 0.01 * values


def measured(key_dim: int = 32, value_dim: int = 16) -> K6V4Range:
    ranges = K6V4Range(2, key_dim, value_dim)
    ranges.measure(*keys_and_values(key_dim, value_dim))
    return ranges


def relative(seen: Tensor, given: Tensor) -> Tensor:
    return (seen - given).abs() / given.std(2, keepdim=True)


def hadamard(H: int) -> Tensor:
    """Spelt out, of a power of two: the sign of i and j is that of the bits that both have."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(H)] for i in range(H)]
    return torch.tensor(signs) / H**0.5


def test_keys_are_as_far_off_as_their_rotated_step_says() -> None:
    keys, _ = keys_and_values(tokens=400)
    ranges = measured()
    codes, steps = ranges.encode_keys(keys)
    seen = ranges.decode_keys(codes, steps, torch.float32)
    root = (ranges.key_step.log2() / 2).round().exp2()
    most = ((seen - keys) / root[:, None]).norm(dim=-1, keepdim=True) / (steps.float() * 32**0.5 / 2)
    assert most.max() < 1.02, "a rotation changes no length, and each number is off by half a step at most"
    usual = [channel for channel in range(32) if channel != 1]
    assert relative(seen, keys)[..., usual].square().mean().sqrt() < 0.03
    assert relative(seen, keys)[..., 1].square().mean().sqrt() < 0.9, "thirty times as rough, at most"


def test_values_are_as_far_off_as_their_rotated_step_says() -> None:
    _, values = keys_and_values(tokens=400)
    ranges = measured()
    codes, steps = ranges.encode_values(values)
    off = ranges.decode_values(codes, steps, torch.float32) - values
    most = off.norm(dim=-1, keepdim=True) / (steps.float() * 16**0.5 / 2)
    assert most.max() < 1.02, "a rotation changes no length, and each number is off by half a step at most"
    assert relative(ranges.decode_values(codes, steps, torch.float32), values).square().mean().sqrt() < 0.12


def test_a_channel_that_stands_out_in_one_token_does_not_drown_the_others() -> None:
    """What rotation is for."""
    values = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(1))
    at = torch.arange(256)
    values[0, 0, at, at % 64] = 20.0
    ranges = K6V4Range(1, 64, 64)
    _, seen = ranges.rounded(values, values)
    without = (values / (steps := values.abs().amax(-1, keepdim=True) / 7.5)).floor() * steps + steps / 2
    off, plain = ((x - values)[values != 20.0].square().mean().sqrt() for x in (seen, without))
    assert off < 0.35 < 0.7 < plain


@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_every_code_comes_back_as_it_was_packed(H: int, tokens: int) -> None:
    """Numbers that are levels already stay what they are, to the bit."""
    ranges = K6V4Range(3, H, H)
    x = torch.randn(2, 3, tokens, H, generator=torch.Generator().manual_seed(H))
    for encode, decode, width in (
        (ranges.encode_keys, ranges.decode_keys, H * 3 // 4),
        (ranges.encode_values, ranges.decode_values, H // 2),
    ):
        codes, steps = encode(x)
        assert codes.shape == (2, 3, tokens, width) and codes.dtype == torch.uint8
        again, _ = encode(decode(codes, steps, torch.float32))
        assert torch.equal(again, codes)


def test_the_first_channels_of_a_plane_lie_in_the_lowest_bits() -> None:
    """The layout that the module's docstring describes, spelt out, with all bits of a code in use."""
    ranges, one = K6V4Range(1, 8, 8), torch.ones(1, 1, 1, 1, dtype=torch.float16)
    whole = [63, 1, 2, 3, 0b100100, 0b010101, 0b110110, 0b000111]
    lower = [whole[i] % 16 + 16 * (whole[i + 4] % 16) for i in range(4)]
    upper = [sum((whole[i + 2 * j] // 16) * 4**j for j in range(4)) for i in range(2)]
    codes = torch.tensor(lower + upper, dtype=torch.uint8).view(1, 1, 1, 6)
    keys = (torch.tensor(whole) - 31.5) @ hadamard(8)
    torch.testing.assert_close(ranges.decode_keys(codes, one, torch.float32).flatten(), keys)
    assert torch.equal(ranges.encode_keys(keys.view(1, 1, 1, 8))[0], codes)
    values = (torch.tensor([w % 16 for w in whole]) - 7.5) @ hadamard(8)
    torch.testing.assert_close(ranges.decode_values(codes[..., :4], one, torch.float32).flatten(), values)


@pytest.mark.parametrize("H", SIZES)
def test_zeros_constants_and_huge_numbers_are_finite(H: int) -> None:
    ranges = K6V4Range(2, H, H)
    for size in (0.0, 1e-30, 1.0, -1.0, 1e6, 1e30, -3e38):
        x = torch.full((1, 2, 3, H), size)
        for seen in ranges.rounded(x, x):
            assert seen.isfinite().all()
            if abs(size) <= 1:  # rotated, a constant is one number and else zeros, which no level is
                largest = abs(size) * H**0.5 / 15 + 2**-15
                assert (seen - x).norm(dim=-1).max() <= 1.02 * largest * H**0.5
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(1, 2, 3, H, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert all(seen.dtype == dtype for seen in ranges.rounded(x, x))


def test_what_a_token_becomes_does_not_depend_on_its_neighbours() -> None:
    keys, values = keys_and_values()
    ranges = measured()
    whole, one = ranges.rounded(keys, values), ranges.rounded(keys[:, :, 7:8], values[:, :, 7:8])
    for seen, alone in zip(whole, one, strict=True):
        torch.testing.assert_close(seen[:, :, 7:8], alone, rtol=0, atol=0)


def test_some_heads_are_decoded_as_all_are() -> None:
    keys, values = keys_and_values()
    ranges = measured()
    for encode, decode, x in (
        (ranges.encode_keys, ranges.decode_keys, keys),
        (ranges.encode_values, ranges.decode_values, values),
    ):
        codes, steps = encode(x)
        part = decode(codes[:, 1:], steps[:, 1:], torch.float32, slice(1, 2))
        assert torch.equal(part, decode(codes, steps, torch.float32)[:, 1:])


def test_under_autocast_nothing_else_is_stored() -> None:
    keys, values = keys_and_values()
    ranges = measured()
    want = ranges.rounded(keys, values)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, ranges.rounded(keys, values), want))


def test_bytes_of_a_token() -> None:
    assert K6V4Range.token_bytes(2, 64, 64) == 2 * (48 + 32 + 4)
    assert 2 * 64 * 2 / K6V4Range.token_bytes(1, 64, 64) == pytest.approx(3.05, abs=0.01)
    assert 2 * 128 * 2 / K6V4Range.token_bytes(1, 128, 128) == pytest.approx(3.12, abs=0.01)


@pytest.mark.parametrize("sizes", [(6, 8), (8, 7)])
def test_heads_that_cannot_be_packed_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ModlabError, match=r"do not divide so: use 'int8'"):
        K6V4Range(2, *sizes)
    Int8Range(2, *sizes)


def test_it_takes_over_what_was_measured_for_eight_bits() -> None:
    eight = Int8Range(2, 32, 16)
    eight.measure(*keys_and_values())
    found = K6V4Range.measured_by(eight)
    assert all(map(torch.equal, eight.buffers(), found.buffers()))
    assert found.state_dict().keys() == eight.state_dict().keys(), "saved files have the same names"
    found.key_shift += 1
    assert not torch.equal(found.key_shift, eight.key_shift), "its own copy"


@pytest.mark.parametrize("kind", [Int8Range, K6V4Range])
def test_another_default_type_changes_nothing(kind: type[Int8Range | K6V4Range]) -> None:
    """Nor what is kept of it for later."""
    keys, values = keys_and_values()
    torch.set_default_dtype(torch.bfloat16)
    k6v4._hadamard.cache_clear()
    try:
        ranges = kind(2, 32, 16)
        ranges.measure(keys, values)
        low = ranges.rounded(keys, values)
    finally:
        torch.set_default_dtype(torch.float32)
    ranges = kind(2, 32, 16)
    ranges.measure(keys, values)
    assert all(map(torch.equal, ranges.rounded(keys, values), low))
