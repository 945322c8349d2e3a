"""Generation health: what a model writes when it reads its own text, which no loss on held-out text shows.

Prompts are pieces of held-out text. The text that really follows them goes through the same measures, as a
yardstick: real text repeats itself as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from modlab.errors import ModlabError, check_count, check_number
from modlab.hf.model import context_length, eval_mode
from modlab.probes import repetition
from modlab.probes.material import token_stream, windows
from modlab.probes.scoring import mean_keep_ratio, score

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

DISTINCT = (1, 2, 4)


@dataclass
class TextHealth:
    """Measures of some texts, each the continuation of a prompt; n-grams and loops are of tokens.

    Attributes:
        texts: how many.
        tokens: of all continuations together, end tokens included.
        ended: share of texts that came to an end token.
        repeated_ngrams: share of n-grams that stand earlier in the same continuation, in [0, 1].
        distinct: by n, different n-grams of all continuations over their n-grams in all, in [0, 1].
        in_loops: share of tokens that lie in a loop: the same tokens three times in a row or oftener, 16
            tokens or more.
        ends_in_loop: share of texts that end in a loop, out of which greedy search seldom finds.
        longest_loop: tokens of the longest loop.
        loss: nats a token under the model itself, given prompt and text before.
        judge_loss: the same under the judge; None without one. Text that repeats itself is easy to predict,
            so a low loss is good news only together with repetition like real text's.
        keep_ratio_by_layer: share of the continuations' tokens that each routed layer keeps; empty for a
            dense model.
        continuations: token ids of each text, for reading; not part of `to_dict`.
    """

    texts: int
    tokens: int
    ended: float
    repeated_ngrams: float
    distinct: dict[int, float]
    in_loops: float
    ends_in_loop: float
    longest_loop: int
    loss: float
    judge_loss: float | None
    keep_ratio_by_layer: dict[int, float]
    continuations: list[list[int]] = field(repr=False)

    @property
    def keep_ratio(self) -> float:
        """Mean over routed layers; 1.0 for a dense model."""
        return mean_keep_ratio(self.keep_ratio_by_layer)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the continuations, in what JSON can hold (keys of dicts become strings there)."""
        facts = asdict(self)
        del facts["continuations"]
        return facts | {"keep_ratio": self.keep_ratio}


@dataclass
class GenerationHealth:
    """What `generation_health` found.

    Attributes:
        greedy: text that greedy search wrote.
        sampled: text that was sampled.
        heldout: the text that really follows the prompts.
        settings: prompts, prompt_tokens, new_tokens, n, temperature, seed.
    """

    greedy: TextHealth
    sampled: TextHealth
    heldout: TextHealth
    settings: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain numbers."""
        texts = {name: getattr(self, name).to_dict() for name in ("greedy", "sampled", "heldout")}
        return texts | {"settings": dict(self.settings)}

    def frame(self) -> pd.DataFrame:
        """One line a kind of text: the measures of `TextHealth`, `distinct_<n>` and `keep_ratio_<layer>`."""
        import pandas as pd

        lines = {}
        for name in ("greedy", "sampled", "heldout"):
            facts = getattr(self, name).to_dict()
            by_n, by_layer = facts.pop("distinct"), facts.pop("keep_ratio_by_layer")
            facts |= {f"distinct_{n}": share for n, share in by_n.items()}
            lines[name] = facts | {f"keep_ratio_{layer}": share for layer, share in by_layer.items()}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("text")


def generation_health(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    *,
    judge: PreTrainedModel | None = None,
    prompts: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 256,
    n: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> GenerationHealth:
    """Lets a model continue held-out prompts, greedily and by sampling, and measures what it wrote.

    Text is made by `model.generate` with the model's own cache (a converted model's ragged one). Of its
    generation config only the special tokens count: no penalty, filter or beam. Sampling draws from the
    whole softmax; what is drawn depends on `seed` and the prompt's number alone, not on the batch, so two
    models are given the same luck. Losses and keep ratios come from one more forward over the finished text,
    which decides as generation did (in half precision: but for rounding).

    Args:
        model: causal LM, dense or converted, at its present thresholds.
        data: held-out texts or token batches, as `modlab.data.batches` takes them; joined in order.
        tokenizer: for texts.
        judge: a model of the same tokenizer that rates the text, such as the dense one.
        prompts: how many, none of which overlap with another one or its continuation.
        prompt_tokens: length of each.
        new_tokens: most tokens of a continuation; it is shorter where an end token comes first.
        n: of `repeated_ngrams`.
        temperature: of sampling.
        seed: which prompts, and what is drawn.
        batch_size: rows a forward.
        progress: show a progress bar.

    Raises:
        ModlabError: prompt and continuation exceed a model's context, too little data, or a judge whose
            vocabulary is too small to be the same.
    """
    from tqdm.auto import tqdm

    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "n": n, "batch_size": batch_size}
    for name, count in counts.items():
        check_count(name, count)
    if check_number("temperature", temperature) <= 0:
        raise ModlabError(f"temperature={temperature}: give a number above 0.")
    length = prompt_tokens + new_tokens
    for one in filter(None, (model, judge)):
        context = context_length(one)
        if context is not None and length > context:
            raise ModlabError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the context of "
                f"{context:,} tokens: lower prompt_tokens or new_tokens."
            )
    text_NT = windows(token_stream(data, tokenizer, model), prompts, length, length, seed)
    if judge is not None:
        _check_judge(model, judge)
    rated = 3 if judge is None else 6
    total = (2 + rated) * prompts
    with tqdm(total=total, desc="generation", unit="row", disable=not progress) as bar:

        def measured(rows: list[Tensor]) -> TextHealth:
            return _measure(model, judge, rows, prompt_tokens, n, batch_size, bar)

        prompt_NP = text_NT[:, :prompt_tokens]
        greedy = _generate(model, prompt_NP, new_tokens, None, seed, batch_size, bar)
        sampled = _generate(model, prompt_NP, new_tokens, temperature, seed, batch_size, bar)
        return GenerationHealth(
            greedy=measured(greedy),
            sampled=measured(sampled),
            heldout=measured(list(text_NT)),
            settings={
                "prompts": prompts,
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "n": n,
                "temperature": temperature,
                "seed": seed,
            },
        )


class _SeededSampling(LogitsProcessor):
    """Makes greedy search a draw from softmax(logits / temperature), with a random stream for each row.

    The argmax of logits less the logarithm of exponential noise is such a draw (torch.multinomial does the
    same). With `do_sample` the rows of a batch would share one stream, and a sample would depend on its
    neighbours and on the batch size.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        return scores.float() / self.temperature - torch.stack(rows).log().to(scores.device)


def _generate(
    model: Any,
    prompt_NP: Tensor,
    new_tokens: int,
    temperature: float | None,
    seed: int,
    batch_size: int,
    bar: Any,
) -> list[Tensor]:
    """Each prompt with its continuation, long [T] on the CPU, cut after the first end token."""
    device = next(model.parameters()).device
    ends = torch.tensor(_end_tokens(model))
    prompt_tokens = prompt_NP.shape[1]
    rows: list[Tensor] = []
    for start in range(0, len(prompt_NP), batch_size):
        ids_BP = prompt_NP[start : start + batch_size].to(device)
        processors = LogitsProcessorList()
        if temperature is not None:
            seeds = [seed * 2**20 + start + row for row in range(len(ids_BP))]
            processors.append(_SeededSampling(temperature, seeds))
        with eval_mode(model), _plain_generation(model):
            made_BT = model.generate(
                ids_BP,
                attention_mask=torch.ones_like(ids_BP),
                logits_processor=processors,
                max_new_tokens=new_tokens,
            ).cpu()
        for made_T in made_BT:
            ended = torch.isin(made_T[prompt_tokens:], ends).nonzero().flatten()
            rows.append(made_T[: prompt_tokens + int(ended[0]) + 1] if len(ended) else made_T)
        bar.update(len(ids_BP))
    return rows


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Nothing of the model's generation config inside but its special tokens: no penalty, filter or beam."""
    own, ends = model.generation_config, _end_tokens(model)
    pad = own.pad_token_id if own.pad_token_id is not None else next(iter(ends), 0)
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _measure(
    model: Any, judge: Any, rows: list[Tensor], prompt_tokens: int, n: int, batch_size: int, bar: Any
) -> TextHealth:
    """The measures of the rows past their prompts."""
    texts = [row[prompt_tokens:].tolist() for row in rows]
    tokens = sum(map(len, texts))
    columns = range(prompt_tokens, max(map(len, rows)))
    own = score(model, rows, columns, batch_size=batch_size, bar=bar)
    judged = score(judge, rows, columns, batch_size=batch_size, bar=bar) if judge is not None else None
    loops = [repetition.in_loop(ids) for ids in texts]
    ends = set(_end_tokens(model))
    return TextHealth(
        texts=len(texts),
        tokens=tokens,
        ended=sum(not ends.isdisjoint(ids) for ids in texts) / len(texts),
        repeated_ngrams=repetition.repeated_ngrams(texts, n),
        distinct={k: repetition.distinct_ngrams(texts, k) for k in DISTINCT},
        in_loops=sum(int(inside.sum()) for inside, _ in loops) / tokens,
        ends_in_loop=sum(bool(inside[-1]) for inside, _ in loops) / len(texts),
        longest_loop=max(longest for _, longest in loops),
        loss=float(own.loss.double().nanmean()),
        judge_loss=None if judged is None else float(judged.loss.double().nanmean()),
        keep_ratio_by_layer=own.keep_ratio_by_layer(slice(None), slice(prompt_tokens, None)),
        continuations=texts,
    )


def _check_judge(model: Any, judge: Any) -> None:
    vocabularies = [one.get_input_embeddings().weight.shape[0] for one in (model, judge)]
    if vocabularies[1] < vocabularies[0]:
        raise ModlabError(
            f"the judge knows {vocabularies[1]:,} tokens, the model {vocabularies[0]:,}: a judge reads the "
            "model's token ids, so both must have one tokenizer."
        )
