"""What a model type has to show before it counts as supported, on a tiny random model of it.

`families.report()` and `tests/families/test_every_family.py` both come through `prove`, so that
docs/models.md says what the tests hold. Every claim of `prove` is about the converted model with *all*
routable layers routed as a whole (skip="layer") and a batch of rows padded on the left, under each attention
implementation that the type has.

Run as a program this module is the fresh process that reloads saved models: one folder a line on stdin, the
reason why it fails ("" if it does not), as JSON, on stdout.

Shape letters: B batch rows, T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

import modlab
from modlab.cache import bytes as kv_bytes
from modlab.cache.layer import RaggedLayer
from modlab.families.oracle import Decisions, NotHidden, oracle_logits
from modlab.families.tiny_models import quiet, tiny_model
from modlab.hf.anatomy import decoder_layers
from modlab.hf.names import CACHE_ARGUMENTS, cache_argument
from modlab.routing.state import masked_execution, record_routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modlab.routing.record import RoutingStep

ROW_LENGTHS = (17, 12, 7)
"""Real tokens in each row of the batch. A prime, and longer than the tiny models' sliding windows."""
PREFIXES = (9, 12)
"""Where the batch is cut into a prefill, a chunk, and single tokens. The shortest row starts in the chunk."""
TOLERANCE = 1e-5
"""Logit difference that counts as fp32 rounding, as a share of the largest logit."""
STEPS_TOLERANCE = 1e-4
"""The same where one side went token by token: recurrent layers then sum in another order."""
RELOAD_TOLERANCE = 1e-6
"""The same for the same code in another process, where memory is aligned otherwise."""
DIFFERENT = 1e-3
"""Skipping tokens must change the logits by more than this share of the largest."""
EXPECTED_FILE = "expected.safetensors"
COLUMN_BYTES = 4  # a ragged layer's index: one int32 for each stored token


class Unproven(Exception):
    """A claim that does not hold for a model type; the message says which and by how much."""


@torch.no_grad()
def prove(model_type: str, folder: Path, fresh: FreshProcess, **changes: Any) -> None:
    """Holds a tiny model of the type against every claim.

    Args:
        model_type: by `config.model_type`.
        folder: an empty folder, to save the model to.
        fresh: the process that reloads it.
        changes: made to the tiny model's config.

    Raises:
        Unproven: a claim does not hold.
        ModlabError: the type is refused.
        Exception: whatever the type's own class raises.
    """
    with quiet():
        model, twin = (tiny_model(model_type, **changes) for _ in range(2))  # twin stays dense
        names = attention_implementations(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batch = Batch(model)
        modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all"))
        batch.one_row()  # what is refused, is refused here
        modlab.revert(model)
        if not any(name in inspect.signature(type(model).forward).parameters for name in CACHE_ARGUMENTS):
            raise Unproven("transformers' own model has no cache of keys and values")
        dense, leaks = {}, {}
        for name in names:
            model.set_attn_implementation(name)
            dense[name] = batch.one_row(), batch.logits()
            _sound(batch, name, *dense[name], eager=dense[names[0]][0])
            leaks[name] = batch.padding_leaks(dense[name][1])
            if name == names[0]:
                batch.choose_cuts(dense[name][1][:1] if leaks[name] else dense[name][1])

        # Not before the first forward: BigBird swaps a module of its own in it.
        classes = {name: type(module) for name, module in model.named_modules()}

        modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all"))
        for name in names:
            model.set_attn_implementation(name)
            twin.set_attn_implementation(name)
            with _claims_of(name):
                _lossless(batch, *dense[name], leaks[name])
                _skipping(batch, dense[name][1], twin, leaks[name])
        _reloads(batch, folder, fresh)
        modlab.revert(model)
        model.set_attn_implementation(names[0])
        _reverted(batch, dense[names[0]], classes, state)


@contextlib.contextmanager
def _claims_of(attention: str) -> Iterator[None]:
    """Adds the attention implementation to the claim that fails inside this block."""
    try:
        yield
    except Unproven as problem:
        raise Unproven(f"{problem} ({attention})") from problem


def attention_implementations(model: PreTrainedModel) -> list[str]:
    """Those of eager and sdpa that the model's class has."""
    names = []
    for name in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(name)
        except ValueError:  # transformers' refusal of what the class does not support
            continue
        names.append(name)
    return names


class Batch:
    """A padded batch and the model it is for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        embeddings: Any = model.get_input_embeddings()
        B, T = len(ROW_LENGTHS), max(ROW_LENGTHS)
        generator = torch.Generator().manual_seed(0)
        self.ids_BT = torch.randint(3, embeddings.weight.shape[0], (B, T), generator=generator)
        self.mask_BT = (torch.arange(T) >= T - torch.tensor(ROW_LENGTHS)[:, None]).long()
        self.positions_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        # What `generate` passes besides the mask, where the class takes it.
        self.prefixes: tuple[int, ...] = PREFIXES
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def choose_cuts(self, dense_BTV: Tensor) -> None:
        """Leaves the chunk in the middle out if the dense model cannot continue from a cache with one.

        Args:
            dense_BTV: its logits in one forward, of the rows to compare.

        Raises:
            Unproven: nor with single tokens; there is nothing to agree with then.
        """
        reason = ""
        for self.prefixes in (PREFIXES, PREFIXES[-1:]):
            try:
                cache = DynamicCache(config=self.model.config)
                steps_BTV = self.logits_in_steps(cache)[: len(dense_BTV)]
            except Exception as problem:  # the class's own
                reason = f"transformers' own model fails in cached steps: {problem}"
                continue
            if self.difference(steps_BTV, dense_BTV) <= STEPS_TOLERANCE:
                return
            reason = "transformers' own model gives other logits in cached steps than in one forward"
        raise Unproven(reason)

    def real(self, logits_BTV: Tensor) -> Tensor:
        """True for the tokens of these logits that are not padding."""
        return self.mask_BT[: logits_BTV.shape[0], : logits_BTV.shape[1]].bool()

    def one_row(self) -> Tensor:
        """Logits [1, T, V] of the first row on its own: no padding, no mask."""
        return self.model(input_ids=self.ids_BT[:1], use_cache=False).logits

    def logits(self, start: int = 0, stop: int | None = None, cache: Any = None) -> Tensor:
        """Logits [B, T', V] of the columns from `start` to `stop`, through `cache` if there is one."""
        extra = {cache_argument(self.model): cache} if cache is not None else {}
        return self.model(**self.inputs(start, stop), use_cache=cache is not None, **extra).logits

    def inputs(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What the model is called with for the columns from `start` to `stop`, a cache aside."""
        stop = self.ids_BT.shape[1] if stop is None else stop
        given = {"input_ids": self.ids_BT[:, start:stop], "attention_mask": self.mask_BT[:, :stop]}
        if self.takes_positions:
            given["position_ids"] = self.positions_BT[:, start:stop]
        return given

    def logits_in_steps(self, cache: Any) -> Tensor:
        """Logits [B, T, V] by a prefill, one more chunk, and one token a forward, through `cache`."""
        T = self.ids_BT.shape[1]
        cuts = [0, *self.prefixes, *range(self.prefixes[-1] + 1, T + 1)]
        parts = [self.logits(*cut, cache=cache) for cut in zip(cuts, cuts[1:], strict=False)]
        return torch.cat(parts, dim=1)

    def padding_leaks(self, logits_BTV: Tensor) -> bool:
        """Whether the dense model gives a padded row other logits than the same row alone."""
        start = self.ids_BT.shape[1] - ROW_LENGTHS[-1]
        alone_TV = self.model(input_ids=self.ids_BT[-1:, start:], use_cache=False).logits[0]
        padded_TV = logits_BTV[-1, start:]
        return bool((padded_TV - alone_TV).abs().max() > TOLERANCE * alone_TV.abs().max())

    def agree(self, claim: str, got_BTV: Tensor, wanted_BTV: Tensor, tolerance: float = TOLERANCE) -> None:
        """Raises `Unproven` with the claim unless the logits of real tokens are the same within rounding."""
        error = self.difference(got_BTV, wanted_BTV)
        if not error <= tolerance:
            raise Unproven(f"{claim}: logits differ by {error:.1g} of the largest")

    def difference(self, got_BTV: Tensor, wanted_BTV: Tensor) -> float:
        """Largest difference among real tokens, as a share of the largest logit."""
        real = self.real(wanted_BTV)
        worst = (got_BTV[real] - wanted_BTV[real]).abs().max()
        return (worst / wanted_BTV[real].abs().max()).item()


def some_tokens(layer_idx: int, gate: Tensor, position_ids_BT: Tensor) -> Tensor:
    """A random half of the tokens, other ones in each layer (and each of its gates), the same however the
    text is padded and cut."""
    generator = torch.Generator().manual_seed(layer_idx)
    table = torch.rand(max(ROW_LENGTHS), *gate.shape[2:], generator=generator) < 0.5
    return table[position_ids_BT.clamp(min=0)]


def _sound(batch: Batch, attention: str, row_1TV: Tensor, batch_BTV: Tensor, eager: Tensor) -> None:
    """The dense model itself is what a decoder should be."""
    if not all(torch.isfinite(logits[batch.real(logits)]).all() for logits in (row_1TV, batch_BTV)):
        raise Unproven("transformers' own model gives logits that are not finite")
    batch.agree(f"transformers' own {attention} attention differs from its eager one", row_1TV, eager)
    other = batch.ids_BT[:1].clone()
    other[:, -1] = (other[:, -1] + 1) % 100 + 3
    changed_1TV = batch.model(input_ids=other, use_cache=False).logits
    batch.agree("transformers' own model sees later tokens", changed_1TV[:, :-1], row_1TV[:, :-1])


def _lossless(batch: Batch, row_1TV: Tensor, dense_BTV: Tensor, leaks: bool) -> None:
    if not torch.equal(batch.one_row(), row_1TV):
        raise Unproven("conversion changes the logits")
    opened_BTV = batch.logits()
    steps_BTV = batch.logits_in_steps(modlab.RaggedCache(batch.model))
    if leaks:
        # Routed layers never run on padding, so that less of it leaks than in the dense model. The batch's
        # first row has no padding.
        dense_BTV, opened_BTV, steps_BTV = dense_BTV[:1], opened_BTV[:1], steps_BTV[:1]
    batch.agree("open gates differ from the dense model in a padded batch", opened_BTV, dense_BTV)
    batch.agree("the ragged cache differs from the dense model", steps_BTV, dense_BTV, STEPS_TOLERANCE)


def as_the_oracle_says(
    batch: Batch, dense: PreTrainedModel, step: RoutingStep, leaks: bool, **logits_BTV: Tensor
) -> None:
    """Holds logits of the converted model, named by how it ran, to the oracle.

    Args:
        dense: the model before conversion, an object of its own.
        step: the decisions of one of these forwards.
        leaks: whether padding leaks in the dense model; the batch's first row has none then.
    """
    try:
        wanted_BTV = oracle_logits(dense, Decisions.recorded(batch.model, step), **batch.inputs())
    except NotHidden as problem:
        raise Unproven(f"the oracle cannot say what is right: {problem}") from problem
    rows = slice(1 if leaks else None)
    for name, got_BTV in logits_BTV.items():
        batch.agree(f"{name} execution differs from the oracle", got_BTV[rows], wanted_BTV[rows])


def _skipping(batch: Batch, dense_BTV: Tensor, twin: PreTrainedModel, leaks: bool) -> None:
    model = batch.model
    with modlab.routing_override(model, some_tokens):
        with masked_execution(model), record_routing(model) as recording:
            masked_BTV = batch.logits()
        keep = recording.steps[0].keep
        for layer, keep_BT in keep.items():
            if not 0 < keep_BT.sum() < batch.mask_BT.sum():
                raise Unproven(f"the forced routing keeps all tokens or none in layer {layer}: no proof")
        if batch.difference(masked_BTV, dense_BTV) < DIFFERENT:
            raise Unproven("skipping tokens does not change the logits: the routers do not reach the layers")
        packed_BTV = batch.logits()
        batch.agree("packed execution differs from the masked reference", packed_BTV, masked_BTV)
        as_the_oracle_says(batch, twin, recording.steps[0], leaks, masked=masked_BTV, packed=packed_BTV)

        cache = modlab.RaggedCache(model)
        batch.agree("a prefill with cache differs from the reference", batch.logits(cache=cache), masked_BTV)
        _stored(cache, keep, grown=False)
        cache = modlab.RaggedCache(model)
        steps_BTV = batch.logits_in_steps(cache)
        batch.agree("cached steps differ from one forward", steps_BTV, masked_BTV, STEPS_TOLERANCE)
        _stored(cache, keep, grown=True)


def _stored(cache: modlab.RaggedCache, keep: dict[int, Tensor], grown: bool) -> None:
    """The routed layers store the kept tokens (of a sliding window, at least those that it can still see) and
    allocate for them alone (but for slack, once they have grown)."""
    for index, keep_BT in keep.items():
        layer: Any = cache.layers[index]
        kept, visible = keep_BT.sum(1).tolist(), keep_BT.sum(1).tolist()
        if layer.sliding_window is not None:
            visible = keep_BT[:, 1 - layer.sliding_window :].sum(1).tolist()
        if not all(v <= n <= k for v, n, k in zip(visible, layer.lengths, kept, strict=True)):
            raise Unproven(f"cache layer {index} stores {layer.lengths} tokens of {kept} kept ones")
        allocated = kv_bytes.allocated_bytes(vars(layer))
        one, stored = kv_bytes.token_nbytes(layer) + COLUMN_BYTES, sum(layer.lengths)
        free = sum(RaggedLayer.slack(n) for n in layer.lengths) if grown else 0
        if not stored * one <= allocated <= (stored + free) * one:
            raise Unproven(f"cache layer {index}: {stored} tokens of {one} bytes each take {allocated} bytes")


def _reloads(batch: Batch, folder: Path, fresh: FreshProcess) -> None:
    """Routes by routers with random weights, saves, and lets another process compare."""
    model: Any = batch.model
    generator = torch.Generator().manual_seed(0)
    for layer in model.mod.layers:
        router = decoder_layers(model)[layer].mod_router
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        router.bias.zero_()
    with record_routing(model) as recording:
        logits_BTV = batch.logits()
    (step,) = recording.steps
    if all(bool(keep[step.real].all()) for keep in step.keep.values()):
        raise Unproven("random routers keep every token: reloading proves nothing")
    model.save_pretrained(folder)
    save_file({"ids": batch.ids_BT, "logits": logits_BTV.contiguous()}, folder / EXPECTED_FILE)
    reason = fresh.reload(folder)
    if reason:
        raise Unproven(f"reloaded in a fresh process: {reason}")


def _reverted(
    batch: Batch, dense: tuple[Tensor, Tensor], classes: dict[str, type], state: dict[str, Tensor]
) -> None:
    now = batch.model.state_dict()
    if now.keys() != state.keys() or not all(torch.equal(now[name], state[name]) for name in state):
        raise Unproven("revert: the weights are not what they were")
    if {name: type(module) for name, module in batch.model.named_modules()} != classes:
        raise Unproven("revert: a module has another class than before")
    if not (torch.equal(batch.one_row(), dense[0]) and torch.equal(batch.logits(), dense[1])):
        raise Unproven("revert: the logits are not the dense model's")


class FreshProcess:
    """A Python process that has never seen the models which it reloads. One start serves many models."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.communicate()  # an empty line of input ends it

    def reload(self, folder: Path) -> str:
        """Reloads a saved model there and compares its logits: the reason why that fails, or ""."""
        if self._process is None:
            # This very modlab, whatever the working directory holds.
            paths = [str(Path(modlab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "modlab.families.proof"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        ended, self._process = self._process.wait(), None
        return f"the process ended with status {ended}"


@torch.no_grad()
def reload(folder: Path) -> str:
    """What the fresh process does with one folder."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
            # Some models are saved as their text part, which transformers loads by its own class only.
            known = type(config) in AutoModelForCausalLM._model_mapping
            loader = AutoModelForCausalLM if known else getattr(transformers, config.architectures[0])
            model = loader.from_pretrained(folder).eval()
        if not modlab.is_converted(model):
            return "the model came back dense"
        saved = load_file(folder / EXPECTED_FILE)
        batch = Batch(model)
        if not torch.equal(batch.ids_BT, saved["ids"]):
            return "the vocabulary has another size"
        error = batch.difference(batch.logits(), saved["logits"])
        return "" if error <= RELOAD_TOLERANCE else f"logits differ by {error:.1g} of the largest"
    except Exception as problem:  # whatever it is, the other process reports it
        return f"{type(problem).__name__}: {problem}"


def main() -> None:
    """The fresh process: folders in, reasons out."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(reload(Path(line.rstrip("\n")))), flush=True)


if __name__ == "__main__":
    main()
