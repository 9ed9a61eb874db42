"""Smoke tests of stage 1: pytest tests/test_gpt.py. The whole list of its issue is still to be written."""

import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import gpt

SONG = "Noc nad miastem, w oknach śpi światło\nIdę powoli, choć nie jest łatwo\n"
TINY = ["--n_layer", "2", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--batch_size", "4", "--eval_interval", "5",
        "--sample_interval", "0", "--max_new_tokens", "20", "--device", "cpu", "--dtype", "float32", "--dropout", "0.1"]


@pytest.fixture
def corpus(tmp_path):
    """A small file of six songs."""
    path = tmp_path / "songs.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{i}. {SONG * 3}" for i in range(6)), encoding="utf-8")
    return path


def model(recipe="modern", **shape):
    torch.manual_seed(0)
    config = gpt.GPTConfig(**{**dict(vocab_size=20, block_size=12, n_layer=2, n_head=2, n_embd=16, dropout=0.0,
                                     modern=recipe == "modern"), **shape})
    network = gpt.GPTLanguageModel(config)
    for p in network.parameters():  # no zero-initialized matrices: every path counts
        torch.nn.init.normal_(p, std=0.3)
    return network


def test_classic_base_has_the_original_number_of_parameters():
    counts = [sum(p.numel() for p in gpt.GPTLanguageModel(gpt.GPTConfig(158, 256, 6, 6, 384, 0.2, modern)).parameters())
              for modern in (False, True)]
    assert counts[0] == 10_860_446
    assert abs(counts[1] / counts[0] - 1) < 0.02


def test_attention_equals_the_fused_one_in_values_and_gradients():
    attention = model("classic").blocks[0].attention
    x = torch.randn(3, 12, 16, requires_grad=True)
    mask = torch.full((12, 12), -math.inf).triu(1)
    ours = attention(x, mask)
    q, k, v = (part.view(3, 12, 2, 8).transpose(1, 2) for part in attention.qkv(x).split(16, dim=2))
    fused = attention.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 12, 16))
    torch.testing.assert_close(ours, fused)
    up = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, x, up, retain_graph=True)[0] for out in (ours, fused)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("recipe", ["modern", "classic"])
def test_no_position_sees_the_future(recipe):
    network, idx = model(recipe).eval(), torch.randint(20, (1, 12))
    before = network(idx)
    for position in range(1, 12):
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 20
        assert torch.equal(network(changed)[:, :position], before[:, :position])


@pytest.mark.parametrize("recipe", ["modern", "classic"])
def test_the_cache_changes_nothing_while_the_text_fits(recipe):
    network, idx = model(recipe, dropout=0.5).eval(), torch.tensor([[3, 7]])
    cached = [int(token) for token in gpt.generate(network, idx, 10, temperature=0)]
    for token in cached:
        assert int(network(idx)[0, -1].argmax()) == token
        idx = torch.cat((idx, torch.tensor([[token]])), dim=1)
    assert len(list(gpt.generate(network, idx, 40))) == 40  # and goes on past the context


def test_muon_takes_the_librarys_step():
    weights = [torch.nn.Parameter(torch.randn(8, 24)), torch.nn.Parameter(torch.randn(24, 8))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    ours = gpt.Muon([dict(params=[p], shape=tuple(p.shape)) for p in weights], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.Muon(twins, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, twin in zip(weights, twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin in zip(weights, twins):
        torch.testing.assert_close(p, twin, atol=2e-3, rtol=0)  # the library iterates in bfloat16


def test_a_uniform_model_scores_log2_of_the_vocabulary():
    network = model("classic", vocab_size=8, block_size=4)
    for p in network.lm_head.parameters():
        torch.nn.init.zeros_(p)
    config = gpt.make_config(dict(block_size=4, batch_size=2), torch.device("cpu"), None)
    amp = torch.autocast("cpu", torch.bfloat16, enabled=False)
    nats, bits = gpt.evaluate(network, torch.randint(8, (24,)), gpt.CharTokenizer("abcdefg"), config, amp)
    assert nats == pytest.approx(math.log(8)) and bits == pytest.approx(3)


@pytest.mark.parametrize("recipe", ["modern", "classic"])
def test_a_resumed_run_is_bit_identical(corpus, tmp_path, recipe):
    common = ["--input", str(corpus), *TINY, "--recipe", recipe, "--warmup_iters", "2"]
    gpt.main([*common, "--max_iters", "10", "--run_dir", str(tmp_path / "whole")])
    whole = torch.load(tmp_path / "whole" / "model_last.pt", weights_only=True)

    class Cut(gpt.Trainer):
        def step(self):
            if self.now["iter"] == 7:
                raise gpt.Stop("cut off", 1)
            super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "Trainer", Cut)
        with pytest.raises(SystemExit) as stop:
            gpt.main([*common, "--max_iters", "10", "--run_dir", str(tmp_path / "cut")])
    assert stop.value.code == 1
    metrics = gpt.main(["--resume", "--run_dir", str(tmp_path / "cut")])
    resumed = torch.load(tmp_path / "cut" / "model_last.pt", weights_only=True)
    assert metrics["iters"] == 10 and all(torch.equal(whole["model"][name], p) for name, p in resumed["model"].items())


def test_a_run_writes_its_files_and_moves_an_earlier_run_aside(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    for _ in range(2):
        metrics = gpt.main(["--input", str(corpus), *TINY, "--max_iters", "5", "--run_dir", str(run)])
    assert {path.name for path in run.iterdir() if "previous" not in path.name} == {
        "config.json", "metrics.jsonl", "metrics.json", "loss.png", "model_best.pt", "model_last.pt", "output"}
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert len(list(run.glob("previous-*/model_best.pt"))) == 1
    assert (run / "output" / "sample.txt").read_text(encoding="utf-8") in capsys.readouterr().out
    gpt.main(["--sample_only", "--run_dir", str(run), "--prompt", "Noc"])
    assert (run / "output" / "sample.txt").read_text(encoding="utf-8").startswith("Noc")


@pytest.mark.parametrize(("given", "word"), [
    (["--input", "missing.txt"], "missing.txt"), (["--n_head", "3"], "divisible"), (["--temperature", "nan"], "finite"),
    (["--max_iters", "0"], "at least 1"), (["--top_p", "0"], "top_p"), (["--colour", "red"], "--help"),
    (["--resume"], "no checkpoint"), (["--sample_only"], "no checkpoint"), (["--prompt", "Ω"], "Ω"),
    (["--block_size", "5000"], "too short"), (["--load_url", "file:///nowhere/model.pt"], "file:///nowhere"),
])
def test_bad_input_is_one_line_and_writes_nothing(corpus, tmp_path, capsys, given, word):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        gpt.main(["--input", str(corpus), *TINY, "--run_dir", str(run), *given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(("content", "word"), [
    (b"", "empty"), (b"a\0b", "zero bytes"), ("żółw".encode("cp1250"), "UTF-8"), ("żółw".encode("utf-16"), "UTF-16")])
def test_files_that_are_not_plain_text(tmp_path, content, word):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(gpt.Stop, match=word):
        gpt.read_corpus(str(tmp_path / "bad.txt"))


def test_songs_are_read_with_a_bom_and_windows_line_ends(tmp_path):
    (tmp_path / "songs.txt").write_bytes("\ufeffjeden\r\n<|endoftext|>\r\ndwa <|endoftext|>\r\n".encode())
    assert gpt.read_corpus(str(tmp_path / "songs.txt")) == "jeden" + gpt.END + "dwa <|endoftext|>\n"


def test_a_malicious_checkpoint_is_refused_in_one_line_and_runs_no_code(tmp_path, capfd):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "pwned").touch, ()

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SystemExit) as stop:
        gpt.main(["--sample_only", "--save_path", str(tmp_path / "evil.pt"), "--device", "cpu"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "pwned").exists()
