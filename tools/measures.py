"""What can be counted in texts that a model wrote, and how far chance moves each figure. Used by compare_stages.py.

Each measure is a ratio of sums over texts, or the distance of a distribution from the training text's. Its interval
comes from the bootstrap (Efron, 1979): as many texts as there are get drawn with replacement, 2,000 times; the
interval holds the middle 95 % of the figures of these draws.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import corpus_report as corpus
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
RUN = 8  # words in a row that count as copied
ROUNDS, SEED = 2000, 2115  # of the bootstrap
LONGEST = dict(syllable_distance=60, char_distance=300)  # a longer line counts as one of that length
MEASURES = {  # name -> heading, format
    "real": ("real words, %", ".1f"), "unseen": ("words not in the training text, %", ".1f"),
    "distinct_words": ("distinct words, %", ".1f"), "copied": (f"copied runs of {RUN} words, %", ".1f"),
    "rhyming": ("rhyming lines, %", ".1f"), "assonance": ("lines with an assonance, %", ".1f"),
    "verse_lines": ("lines a verse", ".1f"), "song_verses": ("verses a song", ".1f"), "headers": ("headers a song", ".2f"),
    "syllables": ("syllables a line", ".1f"), "uneven": ("syllables between neighbours", ".2f"),
    "syllable_distance": ("syllables: distance", ".2f"), "char_distance": ("characters: distance", ".2f"),
    "distinct_lines": ("distinct lines, %", ".1f"), "repeated": ("lines repeated in the song, %", ".1f")}
SHARES = {name for name, (heading, _) in MEASURES.items() if heading.endswith("%")}


@cache
def training_words(training: str) -> frozenset[str]:
    """The lower-cased words of a text."""
    return frozenset(word.lower() for line in corpus.all_lines(training) for word in corpus.words(line))


@cache
def lengths(text: str, name: str) -> np.ndarray:
    """How many lines have 0, 1, 2, ... syllables or characters, shape (LONGEST + 1,). Example:
    >>> lengths("Szara noc\\nTak", "syllable_distance")[:4].tolist()
    [0, 1, 0, 1]
    """
    size = corpus.syllables if name == "syllable_distance" else len
    values = [min(size(line), LONGEST[name]) for line in corpus.all_lines(text)]
    return np.bincount(np.array(values, dtype=int), minlength=LONGEST[name] + 1)


def distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The Wasserstein-1 distance of two distributions over 0, 1, 2, ..., each along the last axis: the area between their
    cumulative shares, which is how far a line has to grow or shrink on average. Here, half of the lines by two:
    >>> float(distance(np.array([0, 2, 0, 0]), np.array([0, 1, 0, 1])))
    1.0
    """
    ours, theirs = (counts / np.maximum(1, counts.sum(axis=-1, keepdims=True)) for counts in (ours, theirs))
    return np.abs(np.cumsum(ours, axis=-1) - np.cumsum(theirs, axis=-1)).sum(axis=-1)


def count(text: str, training: str) -> dict[str, list]:
    """What each measure counts in one text: [part, whole], or for a distance the lines of each length. Not copies."""
    songs, lines = corpus.split_songs(text), corpus.all_lines(text)
    words = [word for line in lines for word in corpus.words(line)]
    lowered = [word.lower() for word in words]
    verses = [[corpus.syllables(line) for line in verse] for song in songs for verse in corpus.verses(song)]
    steps = [abs(a - b) for verse in verses for a, b in zip(verse, verse[1:])]
    found = {
        "unseen": [sum(word not in training_words(training) for word in lowered), len(words)],
        "distinct_words": [len(set(lowered)), len(words)],
        "rhyming": [sum(map(corpus.rhyming_lines, songs)), len(lines)],
        "assonance": [sum(corpus.rhyming_lines(song, corpus.assonance_key) for song in songs), len(lines)],
        "verse_lines": [len(lines), len(verses)], "song_verses": [len(verses), len(songs)],
        "headers": [sum(map(corpus.headers, songs)), len(songs)],
        "syllables": [sum(map(sum, verses)), len(lines)], "uneven": [sum(steps), len(steps)],
        "distinct_lines": [len(set(lines)), len(lines)],
        "repeated": [sum(map(corpus.repeated_lines, songs)), len(lines)],
        **{name: lengths(text, name) for name in LONGEST}}
    if importlib.util.find_spec("morfeusz2"):
        found["real"] = [sum(map(corpus.is_known, words)), len(words)]
    return found


def copied(text: str, training: str, length: int = RUN) -> tuple[float, int]:
    """What stage 3 calls its copy rate: the share (0 to 1) of runs of `length` words that occur in the training text,
    0 if the text is too short for one; and the words in the longest run that does. Case and punctuation are ignored;
    no run spans two songs. Of three runs of two words, `szara noc` and `noc nad` are copied here, `nad wodą` is not:
    >>> copied("Szara noc\\nnad wodą", "Była szara noc, nad miastem cisza", length=2)
    (0.6666666666666666, 3)
    """
    import gpt_hf  # here, as it takes seconds to import
    rate, longest = gpt_hf.copy_rate(corpus.split_songs(text), gpt_hf.END.join(corpus.split_songs(training)), length)
    return rate or 0.0, longest


def count_copied(texts: list[str], training: str) -> tuple[list[list[float]], int]:
    """For each text [copied runs, runs]; and the longest copied run in all of them."""
    import gpt_hf
    runs = [sum(max(0, len(gpt_hf.words_of(song)) - RUN + 1) for song in corpus.split_songs(text)) for text in texts]
    rate, longest = copied(corpus.join_songs(texts), training)
    rates = [copied(text, training)[0] if rate else 0.0 for text in texts]  # none in all: none in any
    return [[rate * total, total] for rate, total in zip(rates, runs)], longest


def figure(name: str, sums: np.ndarray, training: str) -> np.ndarray:
    """The figure of a measure from its sums over texts, along the last axis; nan where there is nothing to measure."""
    if name in LONGEST:
        return distance(sums, lengths(training, name))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (100 if name in SHARES else 1) * sums[..., 0] / sums[..., 1]


def measure(texts: list[str], training: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(the figures of all texts together, by their names in MEASURES, and the longest copied run; the figures of each round
    of the bootstrap). Measures that are unavailable here are missing."""
    each = [count(text, training) for text in texts]
    counts = {name: np.array([one[name] for one in each], dtype=float) for name in each[0]}
    runs, longest = count_copied(texts, training)
    counts["copied"] = np.array(runs, dtype=float)
    n = len(texts)
    times = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=ROUNDS)  # (rounds, n): how often each is drawn
    values = {name: float(figure(name, array.sum(axis=0), training)) for name, array in counts.items()}
    draws = {name: figure(name, times @ array, training) for name, array in counts.items()}
    return values | dict(longest=longest), draws


def interval(draws) -> tuple[float, float]:
    """Where 95 % of the draws lie. Example: `interval(np.arange(101.0))` is `(2.5, 97.5)`."""
    draws = np.asarray(draws)[np.isfinite(draws)]
    return tuple(map(float, np.quantile(draws, (0.025, 0.975)))) if len(draws) else (np.nan, np.nan)


def by_chance(texts: list[str], key, rounds: int = 5) -> float:
    """The percentage of lines that rhyme when the lines of all texts are shuffled."""
    hits = lines = 0
    for seed in range(rounds):
        for text in corpus.shuffled(texts, seed):
            hits += sum(corpus.rhyming_lines(song, key) for song in corpus.split_songs(text))
            lines += len(corpus.all_lines(text))
    return 100 * hits / max(1, lines)
