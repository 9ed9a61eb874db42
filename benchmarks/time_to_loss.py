"""How much sooner does gpt.py reach the loss that nanoGPT's published laptop settings end with?

    python benchmarks/time_to_loss.py --input FILE [--seeds 3] [--steps 90]

Peer: a plain loop with those settings: 4 layers, 4 heads, 128 wide, context 64, batch 12, no dropout, GELU, LayerNorm
without biases, tied head, scaled_dot_product_attention, fused AdamW (0.9, 0.99), float32, 1e-3 to 1e-4 (cosine, warm-up
100), weight decay 0.1, clip 1.0, 2,000 steps. Its full-validation loss at the end is the target.
Ours: gpt.py's own model and loop with OURS, at most 5 % more parameters, the same text and split; the time until its
full-validation loss is at or below the target. Both are validated on the same characters in consecutive windows, each
with its own context. Training time only, in turn, medians over the seeds. --steps: as many as ours needs on this text.
"""

import argparse
import contextlib
import io
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402

# What ours runs with; max_iters, or --steps, is the length that its schedule is planned for.
OURS = dict(n_layer=2, n_head=4, n_embd=128, block_size=64, batch_size=16, max_iters=90, learning_rate=1e-2,
            dropout=0.0, grow=0)
PEER_STEPS = 2000


class PeerBlock(nn.Module):
    """A pre-norm GPT-2 block."""

    def __init__(self, width=128, heads=4):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        """Shape in and out: (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, dim=2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(out.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Peer(nn.Module):
    """The model of the peer: learned positions, head tied to the embedding."""

    def __init__(self, vocab_size, width=128, layers=4, context=64):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PeerBlock(width) for _ in range(layers)))
        self.norm, self.lm_head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        self.tokens.weight = self.lm_head.weight

    def forward(self, idx, recalled=None):
        """Logits (B, T, vocab_size); the peer ignores what is recalled."""
        x = self.tokens(idx) + self.positions.weight[:idx.size(1)]
        return self.lm_head(self.norm(self.blocks(x)))


def train_peer(train_ids, vocab_size, seed, steps, batch=12, context=64):
    """(model, training seconds) of the peer."""
    torch.manual_seed(seed)
    model = Peer(vocab_size)
    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=other, weight_decay=0.0)],
                                  lr=1e-3, betas=(0.9, 0.99), fused=True)
    ids, began = train_ids.long(), time.perf_counter()
    for step in range(steps):
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 4.5e-4 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - context, (batch,))
        rows = ids[starts[:, None] + torch.arange(context + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, time.perf_counter() - began


def train_ours(path, seed, options):
    """(parameters, lowest full-validation loss, training seconds) of gpt.py's own model and loop."""
    with tempfile.TemporaryDirectory() as folder:
        given = dict(options, seed=seed, run_dir=f"{folder}/run", input=path, eval_interval=options["max_iters"],
                     sample_interval=0, size="tiny", device="cpu")
        with contextlib.redirect_stdout(io.StringIO()), patch.object(gpt, "write_samples"):
            metrics = gpt.run(given)
        return metrics["params"], metrics["val_loss"], metrics["seconds"]


def main(argv=None):
    """Print each run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=OURS["max_iters"])
    args = parser.parse_args(argv)
    ours = OURS | dict(max_iters=args.steps)
    train_text, val_text = gpt.split_corpus(gpt.read_corpus(args.input))
    tokenizer = gpt.make_tokenizer({}, train_text + val_text, None)
    train_ids, val_ids = tokenizer.encode(train_text), tokenizer.encode(val_text)
    window = gpt.make_config(dict(block_size=64, batch_size=64, dtype="float32"), torch.device("cpu"))
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {ours}")
    fast = gpt.mixed_precision("auto", torch.device("cpu")).fast_dtype
    ratios = {name: [] for name in dict.fromkeys((str(fast).removeprefix("torch."), "float32"))}  # what auto takes first
    for seed in range(args.seeds):
        peer, peer_seconds = train_peer(train_ids, tokenizer.vocab_size, seed, PEER_STEPS)
        target = gpt.evaluate(peer, torch.cat((train_ids[-1:], val_ids))[:, None], tokenizer, window, 64)[0]
        size = sum(p.numel() for p in peer.parameters())
        print(f"seed {seed}: peer {size:,} parameters, {target:.3f} after {peer_seconds:.1f} s", flush=True)
        for dtype in ratios:
            params, loss, seconds = train_ours(args.input, seed, dict(ours, dtype=dtype))
            ratios[dtype].append(peer_seconds / seconds if loss <= target else 0)
            print(f"    ours in {dtype}: {params:,} parameters, {loss:.3f} after {seconds:.1f} s; "
                  f"{'reached' if loss <= target else 'NOT REACHED'}, {peer_seconds / seconds:.1f} times faster", flush=True)
    for dtype, values in ratios.items():
        print(f"median, {dtype}: {statistics.median(values):.1f} times faster")


if __name__ == "__main__":
    main()
