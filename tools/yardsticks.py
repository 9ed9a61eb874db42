"""What a model has to beat: bits per character of the validation text, by methods that anyone can run in seconds.

    python tools/yardsticks.py assets/input/input2.txt

Each is given the training text first, split off as the three stages split it. A Kneser-Ney model counts which
character followed the last five (and fewer) in the training text, and does not change after that. A compressor's
figure is the size of the whole text less that of the training part: it keeps learning from the validation text while
it reads it, one character after the other, which a trained model may not. PPMd needs pyppmd (requirements-dev.txt).
"""

import argparse
import lzma
import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus_report as corpus  # noqa: E402

END = "\0"  # between two songs: one character, as in the scripts
ORDER = 6  # characters that Kneser-Ney looks at, including the predicted one
PPM_ORDER = 16  # characters that PPMd looks back at
LONGEST = 20_000_000  # characters; the counts of a longer text would need gigabytes


def kneser_ney(training: str, validation: str, order: int = ORDER) -> float:
    """Bits per character by a modified, interpolated Kneser-Ney model of characters (Chen and Goodman, 1999).

    How often a character followed its context counts at the longest context. At a shorter one it counts in how many
    different longer contexts it did: a character that follows only one of them is a poor guess elsewhere. Each count
    of 1, 2, 3 or more gives up a discount of its own to the shorter context. Example, by hand: order 1 knows counts
    alone. Of "aab" these are 2, which gives up 1/2, and 1, which gives up 1/3; the sum is shared by a, b and any
    unknown character alike:
    >>> round(2 ** -kneser_ney("aab", "a", order=1), 4)  # (2 - 1/2 + 5/6 * 1/3) / 3
    0.5926
    """
    follow: list = [defaultdict(Counter) for _ in range(order)]  # by length: context -> what followed -> how often
    for i in range(order - 1, len(training)):
        follow[-1][training[i - order + 1:i]][training[i]] += 1
    for longer, shorter in zip(follow[:0:-1], follow[-2::-1]):
        for context, counts in longer.items():
            for char in counts:
                shorter[context[1:]][char] += 1
    discounts, totals, shared = [], [], []
    for level in follow:
        times = Counter(count for counts in level.values() for count in counts.values())
        rest = times[1] / max(1, times[1] + 2 * times[2])
        discounts.append([0, *(count - (count + 1) * rest * times[count + 1] / times[count]
                               if times[count] and times[count + 1] else 0.5 for count in (1, 2, 3))])
        totals.append({context: counts.total() for context, counts in level.items()})
        shared.append({context: sum(discounts[-1][min(count, 3)] for count in counts.values())
                       for context, counts in level.items()})
    text, bits, unknown = training + validation, 0.0, 1 / (len(set(training)) + 1)
    for i in range(len(training), len(text)):
        p = unknown
        for length in range(order):
            context = text[i - length:i]
            counts = follow[length].get(context)
            if counts is None:  # nor was a longer one seen
                break
            count = counts[text[i]]
            p = (count - discounts[length][min(count, 3)] + shared[length][context] * p) / totals[length][context]
        bits -= math.log2(p)
    return bits / len(validation)


def compressed(training: str, validation: str, compress) -> float:
    """Bits per character of the validation text: the size of the whole text less that of the training part. Example:
    >>> compressed("raz dwa ", "raz", lambda data: data)
    8.0
    """
    whole, part = (len(compress(text.encode())) for text in (training + validation, training))
    return 8 * (whole - part) / len(validation)


def ppmd(data: bytes) -> bytes:
    """Compress by prediction from partial matches (Shkarin, 2002). ImportError without pyppmd."""
    import pyppmd
    return pyppmd.compress(data, max_order=PPM_ORDER, mem_size=64 << 20)


def xz(data: bytes) -> bytes:
    """Compress by references to earlier text, as xz -9e does."""
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)


def measure(training: str, validation: str) -> dict[str, float]:
    """Bits per character by yardstick; a line says which is left out, and why."""
    if len(training) > LONGEST:
        print(f"yardsticks left out: the text has over {LONGEST:,} characters")
        return {}
    figures = {f"Kneser-Ney, order {ORDER}": kneser_ney(training, validation)}
    try:
        figures[f"PPMd, order {PPM_ORDER}"] = compressed(training, validation, ppmd)
    except ImportError:
        print("PPMd left out: it needs pyppmd (pip install pyppmd)")
    return figures | {"xz": compressed(training, validation, xz)}


def babble(training: str, length: int, seed: int) -> str:
    """Letters by the text's bigrams: each drawn from those that followed the one before it. What chance writes. Example:
    >>> babble("ab\\nab\\n", 5, seed=1)
    'ab\\nab'
    """
    draw, followers = random.Random(seed), defaultdict(Counter)
    for first, second in zip(training, training[1:] + training[:1]):
        followers[first][second] += 1
    choices = {first: (list(counts), list(counts.values())) for first, counts in followers.items()}
    text = [training[0]]
    while len(text) < length:
        text += draw.choices(*choices[text[-1]])
    return "".join(text)


def main(argv: list[str] | None = None):
    """Print a row for each yardstick. Exits 2 on bad input."""
    import gpt  # here, as it takes seconds to import
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: corpus.fail(f"{message}; see --help")
    parser.add_argument("file", help="the text, UTF-8")
    try:
        training, validation = gpt.split_corpus(gpt.read_corpus(parser.parse_args(argv).file))
    except gpt.Stop as reason:
        corpus.fail(reason.args[0])
    for name, bits in measure(training, validation).items():
        print(f"{name:20} {bits:.3f} bits per character")


if __name__ == "__main__":
    main()
