"""Damages data, in the ways of disks, networks, editors and enemies; the same each time for one seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**30, -(10**9), 1e-30, float("nan"), float("inf"), -0.0),
    *("", "x", "NaN", "\0", "../..", "é" * 50, "9" * 5000, [], {}, [[]], {"": None}, [1.5], ["0"], [-1]),
)
TEXTS = (b"", b"{", b"[" * 100_000, b"null", b"[]", b"\xff\xfe", b"NaN", b'{"a":1}')


def mutated(data: bytes, random: Random) -> bytes:
    """`data` with one to three pieces of it changed, lost, doubled or cut."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(BYTES)(data, random)
    return data


def mutated_json(data: bytes, random: Random) -> bytes:
    """The JSON in `data` with one to three of its values replaced, lost, renamed or doubled; sometimes its
    bytes changed instead, or all replaced."""
    if random.random() < 0.4:
        return random.choice(TEXTS) if random.random() < 0.1 else mutated(data, random)
    value = json.loads(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _changed(value, random)
    return json.dumps(value).encode()


def _changed(value: Any, random: Random) -> Any:
    """`value` with one of the values in it changed, at whatever depth."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice([*value])
        what = random.randrange(5)
        if what == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if what == 1:
            return {**value, random.choice(("x", "", "0", key + " ", "format")): random.choice(NASTY)}
        return {**value, key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    return random.choice(NASTY)


def _flip(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data)) if data else 0
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :] if data else b"\1"


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _lose(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.randrange(1, 65) :]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.randrange(1, 65)) + data[at:]


def _double(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at : at + random.randrange(1, 257)] + data[at:]


def _overwrite(data: bytes, random: Random) -> bytes:
    at, length = random.randrange(len(data) + 1), random.randrange(1, 17)
    filling = random.choice((b"\0", b"\xff", b"9", random.randbytes(1)))
    return data[:at] + (filling * length)[: len(data) - at] + data[at + length :]


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _lose,
    _insert,
    _double,
    _overwrite,
)
