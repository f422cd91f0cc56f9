"""The embedded task: five skills to pretrain on, and questions in words about four of them.

A plain line contains operands and the skill's name, a mark, and the answer: `12 + 45 = 57`, `rev k a t -> t a k`.
A row asks for the same skill in a sentence and wants another answer format: `What is the total of 12 and 45?`,
`# 57`. The base has never seen a word of the sentences, so a fine-tune has something to learn. It has learned the
skill, so 200 steps are enough. Everything follows from a seed, and no heavy package is imported.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

MARKS = ("=", "->", "|", "~", "gives", "makes")
"""Separators between the operands and the answer of a plain line."""

PUNCTUATION = ",.?!:;#<>[]/()'"
"""Filler of one character. None of them is a sign or a mark."""


class Skill(NamedTuple):
    """One skill: its name in plain lines, how operands are drawn and solved, and how questions ask for it."""

    sign: str
    sizes: tuple[int, ...]
    draw: Callable[[Random, int], list[str]]
    solve: Callable[[Sequence[str]], str]
    questions: tuple[str, ...]


def pretraining_lines(seed: int) -> Iterator[str]:
    """Yield plain lines without end, each skill equally often."""
    rng = Random(seed)
    while True:
        yield " ".join(plain_line(rng, rng.choice(SKILLS)))


def plain_line(rng: Random, skill: Skill) -> tuple[str, str]:
    """Return one plain line of `skill` in two parts: the prompt, which ends in a mark, and the answer.

    A skill has a sign and made-up names, the name may be anywhere among the operands, and most lines contain filler.
    So the base learns to find words by what they are, not by their position, and that any word may name a skill. This
    is what lets a sentence take the line's place later.
    """
    operands = skill.draw(rng, rng.choice(skill.sizes))
    words = list(operands)
    words.insert(rng.randint(0, len(words)), skill.sign if rng.random() < 0.25 else rng.choice(NAMES[skill.sign]))
    if skill is not COPY and rng.random() < 0.75:  # filler in a copied line would be an operand
        for _ in range(rng.randint(1, 8)):
            words.insert(rng.randint(0, len(words)), _filler(rng))
        words = [word + rng.choice(PUNCTUATION) if rng.random() < 0.1 else word for word in words]
    words.append(rng.choice(MARKS))
    if rng.random() < 0.3:
        words.append(rng.choice(PUNCTUATION))
    return " ".join(words), skill.solve(operands)


COLUMNS = ("question", "answer")
"""Columns of the fine-tuning rows."""


def rows(count: int = 2000, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` fine-tuning rows with the columns `question` and `answer`; no question appears twice."""
    rng = Random(seed)
    answers: dict[str, str] = {}
    while len(answers) < count:
        skill = rng.choice(ASKED)
        operands = skill.draw(rng, skill.sizes[0])
        question = rng.choice(skill.questions).format(*operands)
        answers[question] = f"# {skill.solve(operands)}"
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def _numbers(rng: Random, size: int) -> list[str]:
    return [str(number) for number in rng.sample(range(100), size)]


def _letters(rng: Random, size: int) -> list[str]:
    return rng.sample(ascii_lowercase, size)


def _anything(rng: Random, size: int) -> list[str]:
    draws = (_filler, lambda rng: _numbers(rng, 1)[0], lambda rng: _letters(rng, 1)[0])
    return [rng.choice(draws)(rng) for _ in range(size)]


def _filler(rng: Random) -> str:
    """Return a punctuation mark, or a made-up word that is no name and in no question; some begin with a capital."""
    if rng.random() < 0.1:
        return rng.choice(PUNCTUATION)
    word = _word(rng)
    while word in RESERVED:
        word = _word(rng)
    return word.capitalize() if rng.random() < 0.2 else word


def _word(rng: Random) -> str:
    """Return a made-up word of one to three syllables and at least two letters: one letter would be an operand."""
    word = ""
    while len(word) < 2:
        word = "".join(rng.choice(part) for part in _SYLLABLE * rng.choice((1, 1, 2, 2, 3)))
    return word


_SYLLABLE = (
    ("", "b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "w", "y", "st", "th", "wh", "br"),
    ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ea", "ou"),
    ("", "", "", "", "n", "r", "s", "t", "l", "m", "d", "ck", "gh", "rd"),
)

SUM = Skill(
    sign="+",
    sizes=(2,),
    draw=_numbers,
    solve=lambda operands: str(int(operands[0]) + int(operands[1])),
    questions=("What is the total of {0} and {1}?", "How much are {0} and {1} together?"),
)
GAP = Skill(
    sign="gap",
    sizes=(2,),
    draw=_numbers,
    solve=lambda operands: str(abs(int(operands[0]) - int(operands[1]))),
    questions=("What is the difference of {0} and {1}?", "How far apart are {0} and {1}?"),
)
MAX = Skill(
    sign="max",
    sizes=(3, 2, 4),
    draw=_numbers,
    solve=lambda operands: str(max(int(operand) for operand in operands)),
    questions=("Which is the biggest of {0}, {1} and {2}?", "What is the highest: {0}, {1} or {2}?"),
)
REVERSE = Skill(
    sign="rev",
    sizes=(3, 2, 4),
    draw=_letters,
    solve=lambda operands: " ".join(reversed(operands)),
    questions=("What is {0} {1} {2} backwards?", "How does {0} {1} {2} read from the right?"),
)
COPY = Skill(sign="copy", sizes=(1, 2, 3, 4), draw=_anything, solve=" ".join, questions=())
"""Never asked for. It keeps different words apart in the base, which would otherwise treat all filler alike."""

SKILLS = (SUM, GAP, MAX, REVERSE, COPY)
ASKED = tuple(skill for skill in SKILLS if skill.questions)
"""The skills that questions ask for."""

QUESTION_WORDS = frozenset(
    word.strip(".,:?").lower() for skill in SKILLS for question in skill.questions for word in question.split()
)
"""Every word of the questions, in lower case. No plain line contains one."""


def _made_up_names(num_each: int = 12) -> dict[str, tuple[str, ...]]:
    rng = Random(0)
    words: list[str] = []
    while len(words) < num_each * len(SKILLS):
        word = _word(rng)
        if word not in QUESTION_WORDS and word not in words and len(word) >= 3:
            words.append(word)
    return {skill.sign: tuple(words[index :: len(SKILLS)]) for index, skill in enumerate(SKILLS)}


NAMES = _made_up_names()
"""Names of each skill in plain lines, besides its sign: the same in every corpus."""

RESERVED = QUESTION_WORDS.union(MARKS, NAMES, *NAMES.values())
"""Words that filler must not use."""
