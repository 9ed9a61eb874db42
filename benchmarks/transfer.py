"""Does it pay off to read other Polish first? Fine-tuning against training from scratch, on little and on more text.

    python benchmarks/transfer.py --prose PROSE.txt --input TEXT.txt --out FOLDER

1. gpt_tiktoken.py trains a model with a BPE of its own on the prose, tools/export_hf.py exports it (done once, then found
   in FOLDER).
2. For the first 20,000, 40,000, 80,000 and all characters of the text's training part: gpt_hf.py fine-tunes that model, and
   gpt_tiktoken.py trains from scratch with each vocabulary in SCRATCH, with early stopping; the best of them counts.
All are validated on the last tenth of the text. Runs that are already in FOLDER are not repeated.
"""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import export_hf  # noqa: E402

import gpt_hf  # noqa: E402
import gpt_tiktoken  # noqa: E402

SHAPE = dict(n_layer=4, n_head=4, block_size=128, sample_interval=0, device="cpu", tokenizer="custom")
TEACHER = dict(SHAPE, recall="", n_embd=256, batch_size=16, vocab_size=4000, dropout=0.1, eval_interval=150)
TUNED = dict(epochs=8, patience=2, batch_size=8, block_size=128, learning_rate=1e-3, num_samples=1, max_new_tokens=100,
             device="cpu")
SCRATCH = {size: dict(SHAPE, n_embd=128, batch_size=8, dropout=0.2, patience=6, vocab_size=size) for size in (500, 2000)}
STEPS = {20_000: 200, 40_000: 300, 80_000: 500, None: 2500}  # characters of training text: most steps from scratch


def cut_at(length: int | None):
    """Make both scripts train on the first characters of the training part; validation stays the text's last tenth."""
    split = gpt_tiktoken.split_corpus

    def shorter(text):
        training, validation = split(text)
        return training[:length], validation

    stack = contextlib.ExitStack()
    for stage in (gpt_tiktoken, gpt_hf):
        stack.enter_context(patch.object(stage, "split_corpus", shorter))
    return stack


def once(stage, folder: Path, **options) -> dict:
    """The metrics of a run; a finished one is read, not repeated."""
    if not (folder / "output" / "sample.txt").exists():
        options["output_dir" if stage is gpt_hf else "run_dir"] = folder
        stage.main([f"--{name}={value}" for name, value in options.items()])
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def main(argv=None):
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--iters", type=int, default=1500, help="steps of pre-training (default: %(default)s)")
    args = parser.parse_args(argv)
    exported = args.out / "exported"
    pretrained = once(gpt_tiktoken, args.out / "pretrained", input=args.prose, **TEACHER, max_iters=args.iters)
    if not exported.exists():
        export_hf.export(str(args.out / "pretrained"), str(exported))
    rows = []
    for length, steps in STEPS.items():
        with cut_at(length):
            tuned = once(gpt_hf, args.out / f"tuned-{length}", input=args.input, model_name=exported, **TUNED)
            scratch = []
            for size, options in SCRATCH.items():
                scratch.append(once(gpt_tiktoken, args.out / f"scratch-{size}-{length}", input=args.input, **options,
                                    max_iters=steps, eval_interval=math.ceil(steps / 20)))
        best = min(scratch, key=lambda metrics: metrics["val_bpc"])
        rows.append((length, tuned, best))
    print(f"\npre-training: {pretrained['val_bpc']:.3f} bits per character on its own text, {pretrained['seconds']:.0f} s, "
          f"{pretrained['params']:,} parameters\n")
    print("| characters | before fine-tuning | fine-tuned | epochs | seconds | from scratch | its vocabulary | seconds |")
    print("| --- " * 8 + "|")
    for length, tuned, best in rows:
        print(f"| {length or 'all'} | {tuned['val_bpc_before']:.3f} | {tuned['val_bpc']:.3f} | {tuned['epochs']:.0f} | "
              f"{tuned['seconds']:.0f} | {best['val_bpc']:.3f} | {best['vocab_size']:,} | {best['seconds']:.0f} |")


if __name__ == "__main__":
    main()
