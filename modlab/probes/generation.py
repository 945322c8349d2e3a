"""Generation health: what a model writes when it reads its own text, which no loss on held-out text shows.

Prompts are pieces of held-out text. The text that really follows them goes through the same measures, as a
yardstick: real text repeats itself as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modlab.errors import ModlabError, check_count, check_number
from modlab.hf.model import context_length
from modlab.hf.ranks import is_quiet
from modlab.probes import repetition
from modlab.probes.material import token_stream, windows
from modlab.probes.scoring import mean_keep_ratio, score
from modlab.probes.writing import end_tokens, write

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
    accelerator: Any = None,
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
        accelerator: an `accelerate.Accelerator`: its processes share the rows, and each gets the result of
            all of them. All have to pass the same arguments.

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
    quiet = is_quiet(progress, accelerator)
    rated = 3 if judge is None else 6
    total = (2 + rated) * prompts
    with tqdm(total=total, desc="generation", unit="row", disable=quiet) as bar:
        shared = {"bar": bar, "accelerator": accelerator}

        def measured(rows: list[Tensor]) -> TextHealth:
            return _measure(model, judge, rows, prompt_tokens, n, batch_size, shared)

        prompt_NP = text_NT[:, :prompt_tokens]
        greedy = write(model, prompt_NP, new_tokens, None, seed, batch_size, **shared)
        sampled = write(model, prompt_NP, new_tokens, temperature, seed, batch_size, **shared)
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


def _measure(
    model: Any,
    judge: Any,
    rows: list[Tensor],
    prompt_tokens: int,
    n: int,
    batch_size: int,
    shared: dict[str, Any],
) -> TextHealth:
    """The measures of the rows past their prompts."""
    texts = [row[prompt_tokens:].tolist() for row in rows]
    tokens = sum(map(len, texts))
    columns = range(prompt_tokens, max(map(len, rows)))
    own = score(model, rows, columns, batch_size=batch_size, **shared)
    judged = score(judge, rows, columns, batch_size=batch_size, **shared) if judge is not None else None
    loops = [repetition.in_loop(ids) for ids in texts]
    ends = set(end_tokens(model))
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
