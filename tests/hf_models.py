"""Small real models for the tests of stage 3, made on the spot: no download, no weights in the repository."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VERSES = """Wieczór nad rzeką rozkłada koce mgły
Tramwaj numer siedem wiezie nasze sny
Liczę drobne w dłoni, starczy na chleb
W kieszeni mam rymy i pomięty sklep
Osiedle zasypia, lecz nie śpi nasz blok
Na klatce schodowej ktoś gubi swój krok
Babcia na ławce zna każdy mój błąd
Mówi: chłopaku, wyjedźże stąd
A ja tu zostaję, bo tu mam swój dom
Tu pierwszy mikrofon i pierwszy był prąd
Deszcz pisze po szybie swój własny list
Adresat nieznany, a nadawca liść
Zegar na wieży pomylił się znów
Dwunasta wybiła bez żadnych słów
Kupiłem zeszyt w kratkę za dwa złote
Zapisałem w nim całą naszą robotę
Kolega z podwórka wyjechał na wschód
Przysłał mi kartkę: tęsknota i chłód
Siostra gra skrzypce, a sąsiad gra w gry
Pies sąsiada szczeka, aż drżą wszystkim drzwi
Jesień w kaloszach przechodzi przez park
Zostawia kałuże i zapach jak smar
Nie pytaj mnie o to, dokąd ten bieg
Z górki na pazurki, aż spadnie nam śnieg
Gołębie na dachu układają plan
Jak okraść piekarnię, zanim wstanie pan
W oknie na czwartym świeci się lampa
Ktoś pisze doktorat, a ktoś inny kłamstwa
Źdźbło trawy przy torach też ma swój rytm
Pociąg go uczy, jak kończyć ten bit""".splitlines()
END = "<|endoftext|>"


def songs(count: int, lines: int = 8) -> list[str]:
    """Invented songs: each takes its own path through the verses, so that there is something to learn."""
    return ["\n".join(VERSES[(7 * song + step * (1 + song % 3)) % len(VERSES)] for step in range(lines))
            for song in range(count)]


def corpus(count: int = 24, lines: int = 8) -> str:
    """A corpus file's text: songs between lines that hold only the separator."""
    return f"\n{END}\n".join(songs(count, lines)) + "\n"


def tokenizer(vocab_size: int = 400, end: str | None = END) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the verses: it decodes every text exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(["\n".join(VERSES)], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)


def gpt2(vocab_size: int = 400, **options) -> GPT2LMHeadModel:
    """A GPT-2 of two layers with random weights and dropout."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**{**dict(
        vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0), **options}))


def qwen3(vocab_size: int = 400) -> Qwen3ForCausalLM:
    """What stage 2 exports: RoPE, RMSNorm, QK-norm, SwiGLU, no biases, a head of its own."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0))


def bert(vocab_size: int = 400) -> BertForMaskedLM:
    """A model that reads in both directions: it cannot continue a text."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=64, max_position_embeddings=64))


def save(folder, model, tokens=None):
    """A model folder as from_pretrained reads it."""
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder
