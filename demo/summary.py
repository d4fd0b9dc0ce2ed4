#!/usr/bin/env python3
"""What a run of run.sh came to: sizes, sparsity, the validation loss through the stages, and the final model
loaded."""

import argparse
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

from wav2vec2 import wav2vec2_model
from wav2vec2.utils.checkpoint import load_model
from wav2vec2.utils.cost import count_parameters, multiply_accumulates
from wav2vec2.utils.files import UserError, run_script

SNIPPET = """ckpt = torch.load("{path}", weights_only=True)
model = wav2vec2_model(**ckpt["config"])
model.load_state_dict(ckpt["state_dict"], strict=False)
hidden_states, _ = model.eval().extract_features(waveforms)"""


def scalars(exp_dir: Path, tag: str) -> list[float]:
    """The values of a TensorBoard scalar in the last run of a stage, resumed or not, from its update 0 on."""
    events = EventAccumulator(str(exp_dir / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise UserError(f"{exp_dir}/logs has no {tag}: was the run without a valid.tsv?")
    ordered = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
    first = max(place for place, event in enumerate(ordered) if event.step == 0)
    return [event.value for event in ordered[first:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher_ckpt", required=True)
    parser.add_argument("--root_dir", type=Path, required=True, help="run.sh's root_dir")
    parser.add_argument("--final_dir", type=Path, required=True, help="run.sh's final_dir")
    parser.add_argument("--target_sparsity", type=float, default=0.75)
    args = parser.parse_args()
    final = args.final_dir / "ckpts" / "pruned_hubert_base.pth"
    teacher, student = load_model(args.teacher_ckpt), load_model(final)
    sizes = [count_parameters(model) for model in (teacher, student)]
    costs = [multiply_accumulates(model) / 1e6 for model in (teacher, student)]
    files = [Path(path).stat().st_size / 1e6 for path in (args.teacher_ckpt, final)]
    stage1, stage3 = (scalars(folder, "valid_loss_distill") for folder in (args.root_dir, args.final_dir))

    print(f"\n{'':26}{'teacher':>14}{'compressed':>14}")
    print(f"{'parameters':26}{sizes[0]:>14,}{sizes[1]:>14,}")
    print(f"{'file, MB':26}{files[0]:>14.1f}{files[1]:>14.1f}")
    print(f"{'MMACs a second of audio':26}{costs[0]:>14,.0f}{costs[1]:>14,.0f}")
    print(f"\nsparsity {1 - sizes[1] / sizes[0]:.4f}, target {args.target_sparsity:.4f}")
    print("\nvalidation distillation loss (lower is better)")
    for words, value in (
        ("at the start, gates open", stage1[0]),
        ("after stage 1, under the gates", stage1[-1]),
        ("after stage 2, pruned", stage3[0]),
        ("after stage 3, distilled again", stage3[-1]),
    ):
        print(f"    {words:34}{value:>9.4f}")

    ckpt = torch.load(final, weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    model.load_state_dict(ckpt["state_dict"], strict=False)
    hidden_states, _ = model.eval().extract_features(torch.randn(1, 16_000))
    print("\n" + SNIPPET.format(path=final))
    print(f"# {len(hidden_states)} hidden states of {tuple(hidden_states[-1].shape)} for one second of audio")


if __name__ == "__main__":
    run_script(main)
