"""Questions over a long text after the published description of RULER (arXiv 2404.06654), in our own words.

Needles in running text (one; one of four that look alike; four values of one name), variables that get
their value from one another, the words that come most often. Scores are not RULER's: text, wording and sizes
differ.

Shape letters: T tokens.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modlab.errors import ModlabError

NOUNS = (
    "anchor", "barrel", "basket", "bottle", "bridge", "candle", "carpet", "castle", "copper", "cotton",
    "desert", "doctor", "engine", "falcon", "forest", "garden", "guitar", "hammer", "harbor", "island",
    "jacket", "kettle", "ladder", "letter", "magnet", "marble", "market", "mirror", "needle", "nickel",
    "orange", "pepper", "pocket", "ribbon", "river", "saddle", "shadow", "silver", "temple", "window",
)  # fmt: skip
HOPS = 4  # of a chain of variables
OFTEN = 3  # words that are asked for


@dataclass(frozen=True)
class Question:
    """A prompt that ends where the answer begins.

    Attributes:
        prompt: token ids [T], as many as were asked for.
        answers: what has to stand in the continuation.
        new_tokens: how long that may be.
    """

    prompt: list[int]
    answers: tuple[str, ...]
    new_tokens: int

    def score(self, written: str) -> float:
        """Share of the answers that stand in `written`."""
        return sum(answer in written for answer in self.answers) / len(self.answers)


class Page:
    """Puts a prompt of exactly so many tokens together.

    Args:
        tokenizer: the model's.
        text: token ids of running text to hide lines in, at least `length`.
        length: tokens of the prompt.
        rng: of places, names and values.
    """

    def __init__(self, tokenizer: Any, text: Sequence[int], length: int, rng: random.Random) -> None:
        self.tokenizer, self.text, self.length, self.rng = tokenizer, text, length, rng

    def ids(self, text: str) -> list[int]:
        """Tokens of some text, without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def room(self, *parts: list[int]) -> int:
        """Tokens that are left next to these parts.

        Raises:
            ModlabError: too few to hide anything in.
        """
        left = self.length - sum(map(len, parts))
        if left < 32:
            raise ModlabError(
                f"length={self.length}: the question alone takes {self.length - left} tokens; ask for longer "
                "prompts."
            )
        return left

    def hidden(self, before: str, lines: Sequence[str], after: str) -> list[int]:
        """The lines at random places of the running text, in their order."""
        head, tail = self.ids(before + "\n"), self.ids("\n" + after)
        needles = [self.ids(f"\n{line}\n") for line in lines]
        room = self.room(head, tail, *needles)
        cuts = sorted(self.rng.randrange(room + 1) for _ in lines)
        made, done = list(head), 0
        for needle, cut in zip(needles, cuts, strict=True):
            made += [*self.text[done:cut], *needle]
            done = cut
        return [*made, *self.text[done:room], *tail]

    def names(self, count: int) -> list[str]:
        """Different names of two nouns."""
        pairs = [f"{one}-{other}" for one in NOUNS for other in NOUNS if one != other]
        return self.rng.sample(pairs, count)

    def numbers(self, count: int) -> list[str]:
        """Different numbers of seven digits."""
        return [str(number) for number in self.rng.sample(range(10**6, 10**7), count)]


INTRODUCTION = "Secret numbers are hidden in the following text. Remember them, you will be asked for them."


def _fact(name: str, number: str) -> str:
    return f"One of the secret numbers of {name} is: {number}."


def needle(page: Page, others: int = 0, values: int = 1) -> Question:
    """The numbers of one name, hidden in running text among those of `others`."""
    asked, *names = page.names(1 + others)
    numbers = page.numbers(values + others)
    answers = tuple(numbers[:values])
    lines = [_fact(asked, number) for number in answers]
    lines += [_fact(name, number) for name, number in zip(names, numbers[values:], strict=True)]
    page.rng.shuffle(lines)
    one = f"What is the secret number of {asked} in the text? The secret number of {asked} is"
    several = (
        f"What are all {values} secret numbers of {asked} in the text? The secret numbers of {asked} are"
    )
    prompt = page.hidden(INTRODUCTION, lines, one if values == 1 else several)
    return Question(prompt, answers, 16 + 16 * values)


def needle_among_keys(page: Page) -> Question:
    """One of four names' numbers."""
    return needle(page, others=3)


def needle_of_values(page: Page) -> Question:
    """Four numbers of one name."""
    return needle(page, values=4)


def variables(page: Page) -> Question:
    """All variables of a chain, the first of which is given a number and each other one the one before."""

    def chain() -> tuple[list[str], str, list[str]]:
        names = ["".join(page.rng.choices(string.ascii_uppercase, k=5)) for _ in range(HOPS + 1)]
        number = page.numbers(1)[0]
        lines = [f"VAR {names[0]} = {number}"]
        lines += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
        return names, number, lines

    def asked(number: str) -> str:
        return (
            f"Question: find all variables that have the value {number} in the text above.\n"
            f"Answer: {HOPS + 1} variables have the value {number}. They are:"
        )

    told, its_number, its_lines = chain()
    names, number, lines = chain()
    example = "\n".join([*its_lines, asked(its_number) + " " + " ".join(told)])
    introduction = "Follow the chain of variables that is hidden in the following text."
    prompt = page.hidden(f"{introduction}\n{example}\n\n{introduction}", lines, asked(number))
    return Question(prompt, tuple(names), 12 * (HOPS + 1))


def frequent_words(page: Page) -> Question:
    """The three words that come most often in a list of made-up ones: the k-th commonest comes 1/k² as
    often as the first, which dots stand for."""

    def word() -> str:
        return "".join(page.rng.choices(string.ascii_lowercase, k=6))

    words = ["...", *(word() for _ in range(200))]
    shares = [1 / rank**2 for rank in range(1, len(words) + 1)]
    head = page.ids("The following text is made of coded words. Count how often each comes.\n")
    tail = page.ids(
        "\nQuestion: which three coded words come most often in the text above? Leave out the dots.\n"
        "Answer: the three words that come most often are:"
    )
    room = page.room(head, tail)
    while True:
        body = page.ids(" ".join(page.rng.choices(words, shares, k=room)))[:room]  # a word is a token or more
        counts = Counter(page.tokenizer.decode(body).split()[1:-1])  # the first and the last may be cut
        del counts["..."]
        (*_, (_, least), (_, next_one)) = ranked = counts.most_common(OFTEN + 1)
        if least > next_one:  # no tie about which words are asked for
            return Question([*head, *body, *tail], tuple(word for word, _ in ranked[:OFTEN]), 16 * OFTEN)


TASKS: dict[str, Callable[[Page], Question]] = {
    "needle": needle,
    "needle of keys": needle_among_keys,
    "needle of values": needle_of_values,
    "variables": variables,
    "frequent words": frequent_words,
}
