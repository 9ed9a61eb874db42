"""The lesson's pictures against what the model itself says: pytest tests/test_lesson_pictures.py."""

import doctest
import io
import math

import lesson_pictures as lesson
import pytest
import torch

import gpt
import gpt_tiktoken

TEXT = "Szara jest noc, i biały jest dzień\nIdę, bo muszę\nSzara jest noc, i biały jest dzień\n\0Żółw żył\n" * 4
SHAPE = "--n_layer 2 --n_head 2 --n_embd 16 --block_size 64 --batch_size 2".split()


def make(script=gpt, *options):
    """A model with random weights that has read nothing yet; its blocks do something, too."""
    given = script.parse_args([*SHAPE, *options])
    config = script.make_config(given, torch.device("cpu"), len(TEXT))
    tokenizer = script.make_tokenizer(given, TEXT, None)
    torch.manual_seed(0)
    model = script.GPTLanguageModel(config, tokenizer.vocab_size).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lesson.Trained(script, model, tokenizer, config, config.block_size)


@pytest.fixture(params=["modern", "classic"])
def trained(request):
    return make(gpt, "--recipe", request.param)


def texts_of(figure):
    """All that is written in a figure, with the titles."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return [artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_the_examples():
    assert doctest.testmod(lesson).failed == 0


def test_guesses_are_what_the_model_draws_from(trained):
    p = lesson.guesses(trained, "Szara ")
    assert p.shape == (trained.tokenizer.vocab_size,) and p.sum() == pytest.approx(1)
    options = dict(temperature=0.0, seed=1)  # the likeliest
    assert lesson.write(trained, "Szara ", 1, **options) == "Szara " + next(trained.tokenizer.stream([p.argmax().item()]))


def test_surprisals_are_the_logarithms_of_the_guesses(trained):
    bits = lesson.surprisals(trained, "Idę, bo")
    expected = []
    for i, token in enumerate(trained.tokenizer.encode("Idę, bo").tolist()):
        with_start = lesson.read(trained, "Idę, bo"[:i], start=True).long()[None]
        scores = trained.model(with_start[..., 0], recalled=with_start[..., 1:])[0, -1]
        expected.append(-scores.log_softmax(dim=-1)[token].item() / math.log(2))
    assert bits.tolist() == pytest.approx(expected, rel=0.05)  # the evaluation may compute in bfloat16


def test_surprisals_cap_nothing():
    trained = make(gpt, "--eval_iters", "1")
    assert len(lesson.surprisals(trained, TEXT)) == len(TEXT)


def test_attention_is_softmax_of_queries_and_keys(trained):
    passage = "Szara jest noc"
    weights = lesson.attention(trained, passage)
    T = len(passage)
    assert weights.shape == (2, 2, T, T)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, T)) and weights.triu(1).eq(0).all()
    seen = []
    for block in trained.model.blocks:
        block.attention.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    lesson.logits(trained, passage)
    for layer, (module, x) in enumerate(seen):
        q, k = (project(x).view(T, 2, 8).transpose(0, 1) for project in (module.query, module.key))
        if module.modern:
            q, k = (gpt.rotate(module.qk_norm(part), trained.model.rope[:, :T]) for part in (q, k))
        scores = q @ k.transpose(-2, -1) / 8**0.5 + trained.model.mask[:T, :T]
        assert torch.allclose(weights[layer], scores.softmax(dim=-1), atol=1e-5)


def test_attention_leaves_no_hook(trained):
    lesson.attention(trained, "noc")
    assert not any(module._forward_hooks for module in trained.model.modules())


def test_where_a_refrain_returns():
    passage, returns = lesson.refrain(TEXT, 200)
    line = "Szara jest noc, i biały jest dzień"
    assert passage == f"{line}\nIdę, bo muszę\n{line}" and passage[returns:] == line
    for longest in (20, 64, 75, 90):
        passage, returns = lesson.refrain(TEXT, longest)
        line = passage[returns:]
        assert len(passage) <= longest and passage.startswith(line + "\n")
    assert lesson.refrain("Nic tu nie wraca\nTo prawda", 100) == ("Nic tu nie wraca\nTo prawda\nNic tu nie wraca", 27)
    assert lesson.refrain("a\nb", 100)[0]  # no line is long enough
    assert lesson.refrain("Tylko raz w piosence\n\0Tylko raz w piosence\n", 100)[0].count("Tylko") == 2


def test_shares_of_attention_by_hand():
    """A line of 4 letters at 0 and at 5: letters 6 and 7 look at 1 and at themselves."""
    weights = torch.zeros(1, 1, 9, 9)
    weights[0, 0, 6, 1], weights[0, 0, 6, 6] = 0.75, 0.25
    weights[0, 0, 7, 4], weights[0, 0, 7, 7] = 0.5, 0.5  # 4 is no neighbour of 2, where it should look
    near, back = lesson.shares_of_attention(weights, 5)
    assert back.item() == pytest.approx(0.375) and near.item() == pytest.approx((1.0 + 1.0) / 2)


def test_a_head_that_copies_is_found_and_recall_is_framed(trained):
    passage, returns = lesson.refrain(TEXT, 200)
    passage, returns = passage[:35] + passage[returns:][:28], 35
    trained = trained._replace(context=64)
    figure = lesson.looking_back(trained, passage, returns, at=14)
    title = next(text for text in texts_of(figure) if text.startswith("Where does head"))
    assert "of layer" in title
    frames = [patch for patch in figure.subfigs[0].axes[0].patches if not patch.get_fill()]
    assert len(frames) == (2 if trained.model.modern else 1)  # classic has no recall
    told = gpt.recall(trained.tokenizer.encode(passage), 10, 255)[returns + 14]
    assert told == trained.tokenizer.encode(passage)[15]  # what the green frame holds


def test_letters_that_are_alike_stand_together():
    trained = make()
    ids = trained.tokenizer.encode("aeioszj").long()
    with torch.no_grad():
        trained.model.token_embedding.weight[ids[:4], :] = 5.0 + torch.rand(4, 16)
    texts = texts_of(lesson.letter_map(trained, TEXT, least=4))
    assert any(text.startswith("Do vowels cluster?") for text in texts)
    assert {"a", "e", "z", "ń"} <= set(texts) and "S" not in texts
    assert any("first principal component" in text and "%" in text for text in texts)


def test_points_are_moved_apart():
    places = torch.tensor([[0.0, 0.0], [0.0, 0.001], [10.0, 1.0], [5.0, 0.5]])
    moved = lesson.apart(places, 0.05)
    gaps = torch.cdist(moved / torch.tensor([10.0, 1.0]), moved / torch.tensor([10.0, 1.0])).fill_diagonal_(1.0)
    assert gaps.min() > 0.045 and torch.allclose(moved[2:], places[2:], atol=1e-4)


def test_bars_name_what_is_invisible():
    trained = make()
    texts = texts_of(lesson.next_tokens(trained, ["Szara ", "noc"], count=40))
    assert {"␣", "↵", "■", "after “Szara ”", "after “noc”", "probability, %"} <= set(texts)


def test_each_letter_of_a_verse_is_drawn():
    trained = make()
    figure = lesson.surprise(trained, "Szara jest noc\nIdę")
    texts = texts_of(figure)
    assert [text for text in texts if len(text) == 1 and text in "Idę↵"][-4:] == list("↵Idę")
    assert any("bits per character" in text for text in texts) and any("surprisal, bits" in text for text in texts)


def test_three_tokenizers_cut_one_line():
    given = gpt_tiktoken.parse_args("--tokenizer custom --vocab_size 270".split())
    tokenizers = {"characters": make().tokenizer, "custom": gpt_tiktoken.make_tokenizer(given, TEXT, None)}
    texts = texts_of(lesson.cuts(tokenizers, "Szara ż"))
    assert f"characters: 7 tokens, vocabulary of {tokenizers['characters'].vocab_size}" in texts
    assert f"custom: {len(tokenizers['custom'].encode('Szara ż'))} tokens, vocabulary of 270" in texts


def test_sub_words_can_be_drawn():
    trained = make(gpt_tiktoken, *"--tokenizer custom --vocab_size 270".split())
    bits = lesson.surprisals(trained, "Szara jest źdźbło")
    ids = trained.tokenizer.encode("Szara jest źdźbło")
    assert len(bits) == len(ids)
    average = next(text for text in texts_of(lesson.surprise(trained, "Szara jest źdźbło")) if "on average" in text)
    assert f"{bits.sum().item() / 17:.2f} bits" in average
    texts_of(lesson.next_tokens(trained, ["Szara"]))


def test_unknown_letters_are_left_out():
    trained = make()
    assert lesson.known(trained, "Qzara 😀noc") == "zara noc"
    assert lesson.guesses(trained, "😀").sum() == pytest.approx(1)  # as without a prompt
    assert lesson.write(trained, "Q", 3).strip("\0") is not None


def test_texts_stand_side_by_side_and_are_no_code():
    table = lesson.side_by_side({"before": "a < b", "after": "<b>x</b>"})
    assert "a &lt; b" in table and "<b>x" not in table and "width: 50%" in table


@pytest.mark.parametrize("draw", [
    lambda t: lesson.next_tokens(t, ["a", "b", "c"]), lambda t: lesson.surprise(t, TEXT),
    lambda t: lesson.looking_back(t, "Szara\nSzara", 6, 2), lambda t: lesson.letter_map(t, TEXT),
    lambda t: lesson.cuts({"characters": t.tokenizer}, "Szara")])
def test_a_picture_is_eight_inches_wide(draw):
    assert draw(make()).get_figwidth() == 8
