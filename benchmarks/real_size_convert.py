"""Converts models of published size and random weights: how exact, how fast, and in how much memory.

    python benchmarks/real_size_convert.py [--models hubert-base ...] [--folder DIR]

Each model is made by transformers, saved, and converted by the scripts' own code in a process of its own.
Its peak memory is what that process needed beyond its start (with its packages imported), as a multiple of
the model's size in float32. From transformers the largest difference is that of any hidden state from
transformers' own, relative to its largest value, computed from the written file. Files of fairseq's and
unilm's layouts are made from the same weights; there the largest difference is that of any weight from the
file that came from transformers.
"""

import argparse
import datetime
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
NORM_FIRST = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
MODELS = {
    "hubert-base": ("hubert", {}),
    "hubert-large": ("hubert", LARGE | NORM_FIRST | {"conv_bias": True}),
    "wav2vec2-base": ("wav2vec2", {}),
    "wav2vec2-large": ("wav2vec2", LARGE),
    "wav2vec2-large-lv60": ("wav2vec2", LARGE | NORM_FIRST | {"conv_bias": True}),
    "wavlm-base-plus": ("wavlm", {}),
    "wavlm-large": ("wavlm", LARGE | NORM_FIRST),
}
CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}

FAIRSEQ_NAMES = {
    r"feature_extractor\.conv_layers\.(\d+)\.conv\.": r"feature_extractor.conv_layers.\1.0.",
    r"feature_projection\.layer_norm\.": "layer_norm.",
    r"feature_projection\.projection\.": "post_extract_proj.",
    r"encoder\.pos_conv_embed\.conv\.": "encoder.pos_conv.0.",
    r"parametrizations\.weight\.original0": "weight_g",
    r"parametrizations\.weight\.original1": "weight_v",
    r"\.attention\.gru_rel_pos_linear\.": ".self_attn.grep_linear.",
    r"\.attention\.gru_rel_pos_const": ".self_attn.grep_a",
    r"\.attention\.rel_attn_embed\.": ".self_attn.relative_attention_bias.",
    r"\.attention\.": ".self_attn.",
    r"(layers\.\d+)\.layer_norm\.": r"\1.self_attn_layer_norm.",
    r"feed_forward\.intermediate_dense\.": "fc1.",
    r"feed_forward\.output_dense\.": "fc2.",
    "masked_spec_embed": "mask_emb",
}


def processor() -> str:
    """What Linux calls the processor, or else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def make(name: str, folder: Path) -> None:
    """Saves the model ``name`` for transformers, and as fairseq or unilm would."""
    import transformers

    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**options)
    model = getattr(transformers, f"{CLASSES[family]}Model")(config)
    model.save_pretrained(folder / name)
    layer_norms = config.feat_extract_norm == "layer"
    tensors = {}
    for key, tensor in model.state_dict().items():
        norm = (
            r"feature_extractor.conv_layers.\1.2.1."
            if layer_norms
            else r"feature_extractor.conv_layers.\1.2."
        )
        key = re.sub(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", norm, key)
        for pattern, theirs in FAIRSEQ_NAMES.items():
            key = re.sub(pattern, theirs, key)
        tensors[key] = tensor
    values = {
        "extractor_mode": "layer_norm" if layer_norms else "default",
        "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        "conv_bias": config.conv_bias,
        "encoder_layers": config.num_hidden_layers,
        "encoder_attention_heads": config.num_attention_heads,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "dropout_input": 0.0,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "dropout": 0.1,
        "layer_norm_first": config.do_stable_layer_norm,
        "encoder_layerdrop": 0.05,
        "normalize": layer_norms,
    }
    if family == "wavlm":
        values |= {"num_buckets": 320, "max_distance": 800}
        values |= {"gru_rel_pos": True, "relative_position_embedding": True}
        content = {"cfg": values, "model": tensors}
    else:
        content = {
            "args": None,
            "cfg": {"model": values | {"_name": family}, "task": values},
            "model": tensors,
        }
    torch.save(content, folder / f"{name}.pt")


def measure(name: str, source: str, folder: Path) -> None:
    """Converts once and prints a line of JSON."""
    from converters import fairseq, huggingface
    from utils.checkpoint import load_model, save_checkpoint

    family, _ = MODELS[name]
    if source == "transformers":
        huggingface.import_transformers()
    start, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if source == "transformers":
        model, _ = huggingface.load_huggingface(str(folder / name), family)
    else:
        model, _ = fairseq.load_fairseq(str(folder / f"{name}.pt"), family)
    out = folder / f"{name}.{source}.pth"
    save_checkpoint(out, model)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if source == "transformers":
        import transformers

        original = getattr(transformers, f"{CLASSES[family]}Model").from_pretrained(folder / name).eval()
        error = huggingface.largest_difference(load_model(out).eval(), original)
    else:
        files = (folder / f"{name}.{kind}.pth" for kind in ("transformers", source))
        first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        assert first.keys() == second.keys()
        error = max((first[key] - second[key]).abs().max().item() for key in first)
    parameters = int(model.get_num_params())
    memory = (peak - start) * 1024 / (4 * parameters)
    print(json.dumps({"parameters": parameters, "error": error, "seconds": seconds, "memory": memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", help="where to make the models; a temporary folder by default")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, name = args.step
        make(name, Path(args.folder)) if step == "make" else measure(name, step, Path(args.folder))
        return
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, {versions}\n")
    print("| model | source | parameters | largest difference | seconds | peak memory / size |")
    print("|---|---|---:|---:|---:|---:|")
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            other = "unilm" if MODELS[name][0] == "wavlm" else "fairseq"
            for step in ("make", "transformers", other):
                command = [sys.executable, __file__, "--folder", folder, "--step", step, name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                if step != "make":
                    r = json.loads(done.stdout.strip().split("\n")[-1])
                    print(f"| {name} | {step} | {r['parameters']:,} | {r['error']:.1e} | ", end="")
                    print(f"{r['seconds']:.1f} | {r['memory']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
