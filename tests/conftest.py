"""Models and data that several tests share. Everything is made here or looked for in MODLAB_TEST_DATA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before modlab's kernels are defined: they run on the CPU

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import modlab
from modlab.families.proof import FreshProcess
from tests.helpers.models import alternate_layers, dense_llama, routed_llama
from tests.helpers.poison import poisoned_memory
from tests.helpers.tokenizers import make_tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers, each with as many threads as cores, wait for each other more than they compute.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-families",
        action="store_true",
        help="test every model type of the installed transformers, not only one for each mechanism",
    )
    parser.addoption(
        "--long",
        action="store_true",
        help="run the tests marked long too, half a minute and more each, and more examples of each property",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--long"):  # before a test file is imported: its properties look at the profile
        settings.register_profile("long", max_examples=20 * settings.default.max_examples)
        settings.load_profile("long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --long"))


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_shows() -> Iterator[None]:
    """A value that is read though nobody wrote it is NaN, and fails the test that it reaches."""
    with poisoned_memory():
        yield


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a tiny dense Llama with random weights; keyword arguments change its config."""
    return dense_llama


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A tiny converted Llama: 6 layers, 1, 3 and 5 routed, all gates open."""
    return modlab.convert(dense_llama(), alternate_layers())


@pytest.fixture
def make_routed_model() -> Callable[[], LlamaForCausalLM]:
    """Makes the tiny converted Llama with random routers, each time the same one."""
    return routed_llama


@pytest.fixture
def routed_model() -> LlamaForCausalLM:
    """The tiny converted Llama with random routers."""
    return routed_llama()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 500 words and bytes."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcess]:
    """A process that reloads models which this one has saved."""
    with FreshProcess() as process:
        yield process


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of third-party checkpoints and texts; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MODLAB_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("third-party test data is absent (set MODLAB_TEST_DATA)")
    return folder
