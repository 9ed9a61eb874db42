"""Pictures of what a model of stage 1 or 2 does: what it guesses, what surprises it, where it looks. Used by the notebook.

    import gpt, lesson_pictures as pictures
    trained = pictures.load(gpt, "assets/char_model")
    pictures.next_tokens(trained, ["Noc", "Noc nad "]).savefig("guesses.png")

Each picture is 8 inches wide, legible at 800 pixels, and in colours that colour-blind people can tell apart. Characters
that the model does not know are left out of the text it reads.
"""

import html
import math
import re
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from pictures import COLORS, SIZES

END = "\0"  # the end of a song inside the scripts
VOWELS = "aąeęioóuy"
SIGNS = {"\n": "↵", " ": "␣", END: "■"}  # how invisible characters are shown
COLUMNS = 64  # characters in a row of a picture
DARK = 0.72  # share of the darkest colour above which letters are white


class Trained(NamedTuple):
    """A model from scratch, and what is needed to use it."""
    script: ModuleType  # gpt or gpt_tiktoken
    model: torch.nn.Module
    tokenizer: Any
    config: Any
    context: int  # how far back it has learned to look


def load(script: ModuleType, folder) -> Trained:
    """The best model of the run in a folder, on the CPU."""
    saved = script.load_checkpoint(f"{folder}/model_best.pt")
    config, tokenizer = script.Config(**saved["config"]), script.make_tokenizer({}, "", saved)
    model = script.GPTLanguageModel(config, tokenizer.vocab_size).eval()
    model.load_state_dict(saved["model"])
    return Trained(script, model, tokenizer, config, saved["context"])


def known(trained: Trained, text: str) -> str:
    """The text without the characters that the model has never seen."""
    chars = getattr(trained.tokenizer, "chars", None)
    return "".join(c for c in text if c in chars) if isinstance(chars, str) else text  # sub-words can spell anything


def read(trained: Trained, text: str, start: bool = False) -> torch.Tensor:
    """The model's input: the tokens, each with what is recalled, shape (N, 1 + orders).

    start: put the token that begins a new text first. An empty text is that token alone.
    """
    encode = trained.tokenizer.encode
    ids = encode(known(trained, text))
    if start or not len(ids):
        ids = torch.cat((encode(trained.tokenizer.start), ids))
    return trained.script.with_recall(ids, trained.config, trained.tokenizer)


@torch.no_grad()
def logits(trained: Trained, text: str) -> torch.Tensor:
    """The scores at the last `context` positions of the text: shape (T, vocab_size)."""
    data = read(trained, text)[-trained.context:].long()[None]  # (1, T, 1 + orders)
    return trained.model(data[..., 0], recalled=data[..., 1:])[0]


def guesses(trained: Trained, prompt: str) -> torch.Tensor:
    """The probability that each token comes next: shape (vocab_size,), sum 1."""
    return logits(trained, prompt)[-1].softmax(dim=-1)


def surprisals(trained: Trained, text: str) -> torch.Tensor:
    """-log2 of the probability that the model gave each token before reading it, in bits: shape (N,)."""
    config = replace(trained.config, eval_iters=0)  # all of it
    nats = trained.script.token_losses(trained.model, read(trained, text, start=True), config, trained.context)
    return nats / math.log(2)


def attention(trained: Trained, text: str) -> torch.Tensor:
    """How much each position looks at each: shape (layers, heads, T, T), each row sums to 1.

    The weights pass through the dropout layer, which does not change them outside of training.
    """
    seen = []

    def note(module, inputs, output):
        if output.ndim == 4:  # the layer is used again, on attention's output
            seen.append(output[0])

    hooks = [block.attention.dropout.register_forward_hook(note) for block in trained.model.blocks]
    try:
        logits(trained, text)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def write(trained: Trained, prompt: str, length: int, **options) -> str:
    """A text by the model: the prompt and `length` tokens. Options as in Config, such as temperature=1.5."""
    config = replace(trained.config, prompt=known(trained, prompt), **options)
    return "".join(trained.script.sample_text(trained.model, trained.tokenizer, config, trained.context, length=length))


def refrain(text: str, longest: int) -> tuple[str, int]:
    """A passage in which a line returns, and where it does: lines in between that do not fit are left out.

    The first line of 12 characters or more that occurs twice in a song; if there is none, the first such line.
    Example:
    >>> refrain("Szara jest noc\\nBiały jest dzień\\nIdę\\nSzara jest noc\\n", 48)
    ('Szara jest noc\\nBiały jest dzień\\nSzara jest noc', 32)
    """
    returning = re.search(rf"^([^\n{END}]{{12,}})$[^{END}]*?\n\1$", text, re.MULTILINE)
    start = returning or re.search(rf"^([^\n{END}]{{12,}})$", text, re.MULTILINE)
    line = start[1] if start else text[:longest]
    line = line[:max(1, (longest - 1) // 2)]
    lines = [line, *text[start.start():].partition("\n")[2].partition(END)[0].split("\n")] if start else [line]
    passage = line
    for following in lines[1:]:
        if following == line or len(passage) + len(following) + len(line) + 2 > longest:
            break
        passage += "\n" + following
    passage = passage.rstrip("\n") + "\n"
    return passage + line, len(passage)


# ------------------------------------------------------------------------------------------- pictures
def sign(piece: str) -> str:
    """How a token is shown: invisible characters get a sign. Example: sign(" no\\n") is "␣no↵"."""
    return "".join(SIGNS.get(c, c if c.isprintable() else "�") for c in piece)


@matplotlib.rc_context(SIZES)
def next_tokens(trained: Trained, prompts: list[str], count: int = 10) -> Figure:
    """Bars: the likeliest tokens after each prompt, side by side on one scale."""
    figure = Figure(figsize=(8, 0.9 + 0.3 * count), layout="constrained")
    most = 0.0  # the longest bar
    every = figure.subplots(1, len(prompts), sharex=True, squeeze=False)[0]
    for axes, prompt in zip(every, prompts):
        probabilities, order = guesses(trained, prompt).topk(min(count, trained.tokenizer.vocab_size))
        names = [sign("".join(trained.tokenizer.stream([i]))) or "�" for i in order.tolist()]  # no text: a part of a letter
        percent = [100 * p for p in probabilities.tolist()]
        most = max(most, *percent)
        bars = axes.barh(range(len(names)), percent, color=COLORS[0])
        axes.bar_label(bars, [f"{p:.0f}" if p >= 0.5 else "< 1" for p in percent], padding=2, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontfamily="monospace", fontsize=12)
        axes.invert_yaxis()
        axes.set_title(f"after “{known(trained, prompt)}”", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_xlim(0, 1.2 * most)  # with room for the numbers
    every[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel("probability, %", fontsize=11)
    figure.suptitle("What comes next?   ␣ blank   ↵ end of line   ■ end of song   � a part of a letter", x=0.01, ha="left",
                    fontsize=11)
    return figure


def rows_of(text: str) -> list[list[int]]:
    """The indices of the characters in each row of a picture: a row ends with its line or when it is full.

    Example: rows_of("ab\\nc") is [[0, 1, 2], [3]].
    """
    rows: list[list[int]] = [[]]
    for i, char in enumerate(text):
        rows[-1].append(i)
        if char == "\n" or len(rows[-1]) == COLUMNS:
            rows.append([])
    return [row for row in rows if row]


def text_map(figure, axes, text: str, values: list[float], top: float, cmap: str, label: str):
    """Draw a text with a colour behind each character, its value from 0 to `top` or above, and a scale of the colours."""
    rows = rows_of(text)
    colours = matplotlib.colormaps[cmap]
    for y, row in enumerate(rows):
        for x, i in enumerate(row):
            share = min(1.0, values[i] / top)
            axes.add_patch(Rectangle((x, y), 1, 1, color=colours(share), linewidth=0))
            shown = "" if text[i] == " " else sign(text[i])
            axes.text(x + 0.5, y + 0.5, shown, ha="center", va="center_baseline", family="monospace", fontsize=11,
                      color="white" if share > DARK else "#777777" if shown != text[i] else "black")
    axes.set(xlim=(0, COLUMNS), ylim=(len(rows), 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, top), colours)
    figure.colorbar(scale, ax=axes, location="bottom", label=label, aspect=50, shrink=0.6,
                    extend="max" if max(values) > top else "neither")


@matplotlib.rc_context(SIZES)
def surprise(trained: Trained, text: str) -> Figure:
    """A text, each character in the colour of its surprisal. A sub-word's is split equally among its characters."""
    text = known(trained, text)
    values: list[float] = []  # of each character
    sizes = trained.tokenizer.count_chars(read(trained, text)[:, 0])
    for size, bits in zip(sizes.tolist(), surprisals(trained, text).tolist()):
        if size:
            values += [bits / size] * size
        else:  # it continues a letter that the token before began
            values[-1] += bits
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(rows_of(text))), layout="constrained")
    axes = figure.add_subplot()
    text_map(figure, axes, text, values, 8.0, "YlOrBr", "surprisal, bits: 1 is a coin toss, 6 is one of 64 letters")
    axes.set_title(f"How surprised is the model? {sum(values) / len(values):.2f} bits per character on average", loc="left")
    return figure


def shares_of_attention(weights: torch.Tensor, returns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each head looks at the ten letters before, and at its place in the first of two equal lines.

    weights: (layers, heads, T, T); the line begins at 0 and returns at `returns`. Its place: the same letter and its
    neighbours, the next of which says what to write. Means over the letters of the line: (layers, heads) each.
    """
    here = torch.arange(returns + 1, weights.size(-1) - 1)
    there = here - returns
    near = sum(weights[..., here, (here - step).clamp(min=0)] for step in range(10)).mean(dim=-1)
    return near, sum(weights[..., here, there + step] for step in (-1, 0, 1)).mean(dim=-1)


@matplotlib.rc_context(SIZES)
def looking_back(trained: Trained, passage: str, returns: int, at: int, head: tuple[int, int] | None = None) -> Figure:
    """Where a head looks from letter `at` of a line that begins at 0 and returns at `returns`; below, all heads.

    head: (layer, head), both from 1; None: the one that looks most at where the line was before. A green frame: what
    recall shows the model there.
    """
    weights = attention(trained, passage)
    near, back = shares_of_attention(weights, returns)
    layer, number = divmod(int(back.argmax()), back.size(1)) if head is None else (head[0] - 1, head[1] - 1)
    here = min(returns + at, len(passage) - 1)
    values = weights[layer, number, here].tolist()
    rows = rows_of(passage)
    figure = Figure(figsize=(8, 2.2 + 0.26 * len(rows) + 0.28 * len(back)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[0.26 * len(rows) + 1.1, 1.1 + 0.28 * len(back)])
    axes = above.add_subplot()
    text_map(above, axes, passage, values, max(*values, 1e-9), "Blues", "attention weight, in all 1")
    frames = {here: COLORS[1]}
    if (read(trained, passage)[here, 1:] != trained.tokenizer.vocab_size).any():
        frames[here - returns + 1] = COLORS[2]
    for y, row in enumerate(rows):
        for x, i in enumerate(row):
            if i in frames:
                axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=frames[i], linewidth=2.5, zorder=3))
    axes.set_title(f"Where does head {number + 1} of layer {layer + 1} look from the orange frame? (green: what recall shows)",
                   loc="left")
    titles = "To the ten letters before, %", "To its place in the first such line, %"
    for axes, shares, title in zip(below.subplots(1, 2, sharey=True), (near, back), titles):
        axes.imshow(100 * shares.numpy(), cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(shares.tolist()):
            for j, share in enumerate(row):
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > DARK else "black")
        axes.set_xticks(range(shares.size(1)), range(1, shares.size(1) + 1))
        axes.set_yticks(range(shares.size(0)), range(1, shares.size(0) + 1))
        axes.set(xlabel="head", title=title)
        axes.label_outer()
    below.axes[0].set_ylabel("layer")
    return figure


def apart(places: torch.Tensor, least: float) -> torch.Tensor:
    """Points (n, 2) moved until they are about `least` apart, in fractions of the picture's width and height."""
    size = places.max(dim=0).values - places.min(dim=0).values
    places = places / size.clamp(min=1e-9)
    for _ in range(100):
        gaps = places[:, None] - places  # (n, n, 2)
        far = gaps.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        places = places + (0.25 * (least - far).clamp(min=0) * gaps / far).sum(dim=1)
    return places * size


@matplotlib.rc_context(SIZES)
def letter_map(trained: Trained, text: str, least: int = 20) -> Figure:
    """The embeddings of lower-case letters that occur `least` times or more, on the plane on which they differ most.

    PCA: the first two right singular vectors of the centred matrix.
    """
    letters = sorted(c for c in set(text) if c.islower() and text.count(c) >= least)
    ids = trained.tokenizer.encode("".join(letters)).long()
    vectors = trained.model.token_embedding.weight.detach().float()[ids]  # (n, C)
    vectors = vectors - vectors.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(vectors, full_matrices=False)
    places = apart(vectors @ directions[:2].T, 0.045)  # (n, 2); letters on top of each other can't be read
    shares = 100 * lengths**2 / (lengths**2).sum()
    vowels = torch.tensor([c in VOWELS for c in letters])
    nearest = torch.cdist(vectors, vectors).fill_diagonal_(float("inf")).argmin(dim=1)
    alike = int((vowels[nearest] == vowels).sum())
    n, v = len(letters), int(vowels.sum())
    chance = (v * (v - 1) + (n - v) * (n - v - 1)) / max(1, n - 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot(xlabel=f"first principal component ({shares[0]:.0f} % of the variance)",
                              ylabel=f"second principal component ({shares[1]:.0f} %)")
    for kind, name, color, marker in ((vowels, "vowels", COLORS[1], "o"), (~vowels, "consonants", COLORS[0], "s")):
        axes.scatter(*places[kind].T.numpy(), s=320, color=color, marker=marker, alpha=0.25, linewidth=0, label=name)
    for letter, place, vowel in zip(letters, places.tolist(), vowels.tolist()):
        axes.text(*place, letter, ha="center", va="center_baseline", fontsize=15, color="#8A3C00" if vowel else "#004A75")
    axes.legend(markerscale=0.6)
    axes.set_title(f"Do vowels cluster? The nearest letter is of the same kind for {alike} of {n}, by chance for {chance:.0f}",
                   loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@matplotlib.rc_context(SIZES)
def cuts(tokenizers: dict[str, Any], line: str) -> Figure:
    """How each tokenizer cuts a line: pieces in alternating colours. A byte that is no letter is shown as �."""
    figure = Figure(figsize=(8, 0.6 + 0.75 * len(tokenizers)), layout="constrained")
    axes = figure.add_subplot()
    widest = 0
    for row, (name, tokenizer) in enumerate(tokenizers.items()):
        pieces = getattr(tokenizer, "pieces", None)  # of bytes; a character tokenizer has none
        ids = tokenizer.encode(line).tolist()
        cells = [pieces[i].decode(errors="replace") if pieces else tokenizer.chars[i] for i in ids]
        axes.text(0, row, f"{name}: {len(ids)} tokens, vocabulary of {tokenizer.vocab_size:,}", va="bottom", fontsize=11)
        x = 0
        for number, cell in enumerate(cells):
            axes.add_patch(Rectangle((x, row + 0.05), len(cell), 0.42, color=("#B3D9F2", "#FFD9A0")[number % 2], linewidth=0))
            for i, char in enumerate(cell):
                axes.text(x + i + 0.5, row + 0.26, sign(char), ha="center", va="center_baseline",
                          family="monospace", fontsize=11)
            x += len(cell)
            axes.plot([x, x], [row + 0.05, row + 0.47], color="black", linewidth=0.8)
        widest = max(widest, x)
    axes.set(xlim=(0, max(widest + 0.2, 48)), ylim=(len(tokenizers) - 0.4, -0.35))
    axes.axis("off")
    axes.set_title("How is a line cut?   ␣ blank   � a part of a letter", loc="left")
    return figure


def side_by_side(texts: dict[str, str]) -> str:
    """HTML: texts in columns below their headings."""
    style = ("vertical-align: top; text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; padding: 0 8px; "
             f"width: {100 // len(texts)}%")
    heads = "".join(f'<th style="{style}">{html.escape(name)}</th>' for name in texts)
    cells = "".join(f'<td style="{style}">{html.escape(text)}</td>' for text in texts.values())
    return f'<table style="width: 100%; table-layout: fixed"><tr>{heads}</tr><tr>{cells}</tr></table>'
