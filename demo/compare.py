"""Compares the features that a teacher and its student compute of three utterances."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SAMPLE_RATE, AudioDataset
from dataset.batches import MAX_SAMPLES, MIN_SAMPLES
from utils.checkpoint import load_model
from utils.cli import run_script
from wav2vec2 import Wav2Vec2Model
from wav2vec2.cost import count_parameters


def features(model: Wav2Vec2Model, waveform: Tensor) -> tuple[Tensor, float]:
    """The last layer's features of a waveform (time,), (frame, feature), and the seconds that they took."""
    start = time.perf_counter()
    result = model(waveform.unsqueeze(0))[0][0]
    return result, time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="the teacher's checkpoint")
    parser.add_argument("--student", required=True, help="the student's checkpoint")
    parser.add_argument("--tsv_dir", type=Path, required=True, help="folder of valid.tsv and train.tsv")
    args = parser.parse_args()
    teacher, student = (load_model(path).eval().fold_weight_norm() for path in (args.teacher, args.student))
    sets = [AudioDataset(args.tsv_dir, name) for name in ("valid", "train")]
    usable = [(audio, i) for audio in sets for i, length in enumerate(audio.lengths) if length >= SAMPLE_RATE]
    sizes = [f"{count_parameters(model) / 1e6:.1f} million" for model in (teacher, student)]
    print(
        f"\nFeatures of the last layer, of the teacher with {sizes[0]} parameters and the student with "
        f"{sizes[1]}. The cosine is\n1 where both point in the same direction; beside it stands, to compare, "
        "the cosine with the teacher's features of\nanother moment of the utterance.\n\n"
        f"{'utterance':<28}{'seconds':>9}{'frames':>8}{'cosine':>8}{'another':>9}"
        f"{'teacher, ms':>13}{'student, ms':>13}"
    )
    for model in (teacher, student):
        features(model, torch.zeros(MIN_SAMPLES))  # The first call is slower than the others.
    for audio, index in usable[:3]:
        samples = min(int(audio.lengths[index]), MAX_SAMPLES)
        waveform = audio[index, 0, samples]
        (wanted, slow), (found, fast) = features(teacher, waveform), features(student, waveform)
        same = F.cosine_similarity(found, wanted, dim=-1).mean()
        other = F.cosine_similarity(found, wanted.roll(len(wanted) // 2, 0), dim=-1).mean()
        print(
            f"{audio.paths[index][-28:]:<28}{samples / SAMPLE_RATE:9.1f}{len(wanted):8}{same:8.3f}"
            f"{other:9.3f}{1000 * slow:13.0f}{1000 * fast:13.0f}"
        )


if __name__ == "__main__":
    run_script(main)
