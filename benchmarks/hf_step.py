"""How much faster is a training step of gpt_hf.py than the plain float32 step, and how much memory does each take?

    python benchmarks/hf_step.py            # GPT-2 small, random weights, on the CPU: 4 x 256 tokens, about 3 minutes

Plain: the model as from_pretrained gives it, in float32, and the Trainer's optimizer. Ours: the model as gpt_hf.py
loads it, computing in what `--dtype auto` picks here (bfloat16 where the CPU has it, else float32), or in --dtype.
Each runs in a process of its own; they take turns, step by step, so that both see the same machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SHAPE = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # of GPT-2 small; papuGaPT2 has no dropout


def worker(kind: str, folder: str, wanted: str, rows: int, length: int):
    """Take a step for each line that comes in; answer with its seconds, the loss and the peak memory so far, in GiB."""
    import torch
    import transformers

    import gpt_hf

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cpu = torch.device("cpu")
    if kind == "ours":
        gpt_hf.keep_memory()
        model, amp = gpt_hf.load_pretrained(folder, cpu).model, gpt_hf.mixed_precision(wanted, cpu)
    else:
        model, amp = transformers.AutoModelForCausalLM.from_pretrained(folder), torch.autocast("cpu", enabled=False)
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    for _ in sys.stdin:
        start = time.perf_counter()
        with amp:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dtype = str(amp.fast_dtype if kind == "ours" else torch.float32).removeprefix("torch.")
        answer = dict(seconds=time.perf_counter() - start, loss=loss.item(), dtype=dtype,
                      peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        print(json.dumps(answer), flush=True)


def small_tokenizer():
    """A tokenizer that the model can be loaded with; the step does not use it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b")


def take_turns(command: list, folder: str, steps: int) -> dict:
    """What both workers answer, step by step in turn."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = {kind: subprocess.Popen([*command, kind, folder], **pipes) for kind in ("plain", "ours")}
    answers = {kind: [] for kind in processes}
    for _ in range(steps):
        for kind, process in processes.items():
            print(file=process.stdin, flush=True)
            answers[kind].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return answers


def main(argv=None):
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each, after one to warm up")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(*args.worker, args.dtype, args.rows, args.length)
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, utils

    utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**SHAPE))
        model.save_pretrained(folder)
        small_tokenizer().save_pretrained(folder)
        command = [sys.executable, __file__, "--rows", str(args.rows), "--length", str(args.length), "--dtype", args.dtype]
        answers = take_turns([*command, "--worker"], folder, args.steps + 1)
    print(f"GPT-2, {model.num_parameters():,} parameters, {args.rows} x {args.length} tokens, {args.steps} steps of "
          f"each in turn, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| step | computes in | seconds (median) | fastest | peak memory | loss after all steps |")
    print("| --- " * 6 + "|")
    for kind, steps in answers.items():
        seconds = [step["seconds"] for step in steps[1:]]
        print(f"| {kind} | {steps[0]['dtype']} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | "
              f"{steps[-1]['peak']:.2f} GiB | {steps[-1]['loss']:.5f} |")
    ratios = [plain["seconds"] / ours["seconds"] for plain, ours in zip(answers["plain"][1:], answers["ours"][1:])]
    print(f"\nOurs is {statistics.median(ratios):.2f} times faster (median of the ratios of neighbouring steps, "
          f"{min(ratios):.2f} to {max(ratios):.2f}).")


if __name__ == "__main__":
    main()
