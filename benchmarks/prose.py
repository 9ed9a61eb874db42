"""Make one corpus file of Polish text from two Debian packages, for transfer.py to pre-train on.

    apt-get download fortunes-pl php-faker && for f in *.deb; do dpkg -x $f packages; done
    python benchmarks/prose.py packages prose.txt [--tokenizer 32000]

fortunes-pl: quotations and jokes of mixed origin, colloquial; php-faker: Bruno Schulz, *Sklepy cynamonowe*. Neither
is part of this project. --tokenizer N also trains a BPE of N entries on the text (prose.json): a Polish tokenizer,
trained without the lyrics, which `gpt_tiktoken.py --tokenizer polish --tokenizer_path prose.json` takes.
"""

import argparse
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SEPARATOR = "\n<|endoftext|>\n"


def decode(raw: bytes) -> str:
    """UTF-8, else Latin-2, as the older files have it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("iso8859-2")


def fortunes(folder: Path) -> list[str]:
    """The fortunes of all files; each ends at a line with a percent sign."""
    files = [path for path in sorted(folder.glob("*")) if path.is_file() and path.suffix not in (".dat", ".u8")]
    return [text for path in files for text in re.split(r"^%.*$", decode(path.read_bytes()), flags=re.MULTILINE)]


def novel(path: Path) -> list[str]:
    """The text in php-faker's Text.php, its lines joined to paragraphs."""
    text = re.search(r"<<<'EOT'\n(.*?)\nEOT;", path.read_text(encoding="utf-8"), re.DOTALL)[1]
    return [re.sub(r"(?<=\S)\n(?=\S)", " ", text)]


def clean(text: str) -> str:
    """Composed letters, no control characters, no tabs, no spaces at line ends."""
    text = unicodedata.normalize("NFC", text).replace("\t", " ").replace("\r", "")
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc")
    return re.sub(r" +$", "", text, flags=re.MULTILINE).strip("\n")


def main(argv=None):
    """Write the corpus, and the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=int, default=0, help="entries of a BPE to train on it")
    args = parser.parse_args(argv)
    share = args.packages / "usr/share"
    texts = novel(share / "php/Faker/Provider/pl_PL/Text.php") + fortunes(share / "games/fortunes/pl")
    texts = [text for text in map(clean, texts) if text]
    args.output.write_text(SEPARATOR.join(texts) + "\n", encoding="utf-8", newline="\n")
    print(f"-> {args.output}: {len(texts):,} texts, {sum(map(len, texts)):,} characters")
    if args.tokenizer:
        import gpt_tiktoken
        path = args.output.with_suffix(".json")
        gpt_tiktoken.train_tokenizer(gpt_tiktoken.END.join(texts), args.tokenizer).save(str(path))
        print(f"-> {path}: {args.tokenizer:,} entries")


if __name__ == "__main__":
    main()
