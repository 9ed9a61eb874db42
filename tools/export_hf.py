"""Turns a run of gpt_tiktoken.py into a Hugging Face folder that needs no code of ours.

    python tools/export_hf.py assets/tiktoken_model assets/exported    # the best model of a run, or a .pt file
    python gpt_hf.py --model_name assets/exported                      # fine-tune it, on other text

AutoModelForCausalLM and AutoTokenizer read the folder (Qwen3ForCausalLM). It appears once it is whole; an
earlier export of that name is renamed to FOLDER.previous-<time>; a folder with any other files is left alone.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt_tiktoken import END_TEXT, BPETokenizer, Config, GPTLanguageModel, Stop, keep_previous, load_checkpoint  # noqa: E402

MARK = "export.json"  # the file that marks a folder as our export


def centred(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The weight without its mean along a dimension."""
    return weight - weight.mean(dim=dim, keepdim=True)


def translate_block(block) -> dict[str, torch.Tensor]:
    """The weights of a block under the names of a Qwen3 layer.

    Qwen3 normalizes by the root mean square, we by the standard deviation: they agree where the mean is 0. So
    the mean is removed from all that is added to the residual stream, and from queries and keys; the logits do
    not change.
    """
    attention, feed_forward = block.attention, block.feed_forward
    query, key = (
        centred(part.weight.unflatten(0, (attention.n_head, -1)), dim=1).flatten(0, 1)  # (nh, hs, C), each head
        for part in (attention.query, attention.key))
    return {
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": attention.value.weight,
        "self_attn.o_proj": centred(attention.proj.weight),
        "self_attn.q_norm": attention.qk_norm.weight,
        "self_attn.k_norm": attention.qk_norm.weight,
        "mlp.gate_proj": feed_forward.gate.weight,
        "mlp.up_proj": feed_forward.up.weight,
        "mlp.down_proj": centred(feed_forward.down.weight),
        "input_layernorm": block.norm1.weight,
        "post_attention_layernorm": block.norm2.weight,
    }


@torch.no_grad()
def translate(model: GPTLanguageModel, config: Config, context: int, end: int):
    """The same model as a Qwen3ForCausalLM. context: how far back it has learned to look; end: the end token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # here, as it takes seconds to import

    weights = {
        "model.embed_tokens.weight": centred(model.token_embedding.weight, dim=1),
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for i, block in enumerate(model.blocks):
        layer = translate_block(block)
        weights |= {f"model.layers.{i}.{name}.weight": weight.clone() for name, weight in layer.items()}
    theirs = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(model.token_embedding.weight), hidden_size=config.n_embd,
        intermediate_size=len(model.blocks[0].feed_forward.up.weight), num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_head, head_dim=config.n_embd // config.n_head,
        max_position_embeddings=context, rms_norm_eps=model.norm.eps,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False,
        attention_dropout=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=end))
    theirs.load_state_dict(weights)
    return theirs


def write_export(saved: dict, folder: Path):
    """Write model and tokenizer of a checkpoint to a new folder."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config, context = Config(**saved["config"]), saved["context"]
    tokenizer = BPETokenizer(**saved["tokenizer"])
    model = GPTLanguageModel(config, tokenizer.vocab_size)
    model.load_state_dict(saved["model"])
    translate(model, config, context, tokenizer.end).save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.core, bos_token=END_TEXT, eos_token=END_TEXT, pad_token=END_TEXT, model_max_length=context)
    words.save_pretrained(folder)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    content = dict(made_by="tools/export_hf.py", run_dir=config.run_dir, sha256=files)
    (folder / MARK).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_target(folder: Path, source: Path):
    """Stop unless the folder is new, empty, or an earlier export and nothing else."""
    try:
        ours = {MARK, *json.loads((folder / MARK).read_bytes())["sha256"]}
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= ours):
        raise Stop(f"{folder} exists and is not an earlier export, or holds other files, too: choose another folder")
    if any(place.is_relative_to(folder) for place in (Path.cwd(), source)):
        raise Stop(f"{folder} is in use: choose another folder")


def export(source: str, target: str):
    """Export the best model of a run, or the one in a .pt file. Stop if there is none, or it cannot be exported."""
    path, folder = Path(source).resolve(), Path(target).resolve()
    path = path / "model_best.pt" if path.is_dir() else path
    check_target(folder, path)
    saved = load_checkpoint(str(path))
    if saved["config"]["recipe"] == "classic":
        raise Stop("no Hugging Face class has classic's head bias: train with --recipe modern")
    if saved["config"]["recall"]:
        raise Stop('no Hugging Face class has recall: train with --recall ""')
    if saved["tokenizer"]["keep"] is not None:
        raise Stop("no tokenizer file can store a pruned vocabulary: train without --prune_vocab")
    parent = next(parent for parent in folder.parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        write_export(saved, whole)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        keep_previous(folder)
        whole.rename(folder)
    print(f"-> {target}: a Hugging Face model; gpt_hf.py --model_name {target} fine-tunes it")


def main(argv: list[str] | None = None):
    """Run with these arguments, by default the command line's. A failure is one line, status 2 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RUN", help="folder of a run of gpt_tiktoken.py, or a checkpoint of it")
    parser.add_argument("target", metavar="FOLDER", help="folder to write")
    args = parser.parse_args(argv)
    try:
        return export(args.source, args.target)
    except Stop as reason:
        message, status = reason.args[0], 2
    except OSError as reason:
        message, status = f"cannot write {reason.filename or args.target}: {reason.strerror}", 1
    except Exception as reason:
        if type(reason) not in (Exception, SafetensorError):  # a full disk: tokenizers raises nothing narrower
            raise
        message, status = f"cannot write {args.target}: {reason}", 1
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
