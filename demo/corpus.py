#!/usr/bin/env python3
"""Synthesises a small LibriSpeech-shaped corpus of speech-like audio: vowels and fricatives of several
voices."""

import argparse
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
VOWELS = np.array(
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]]
)
"""First three formants in Hz of five vowels (Peterson and Barney 1952, men)."""


def syllable(generator: np.random.Generator, pitch: float, tract: float) -> np.ndarray:
    """A burst of noise and a vowel: harmonics of a gliding pitch under the envelope of its formants.

    Args:
        pitch: fundamental frequency of the voice in Hz.
        tract: factor on the formants; a shorter vocal tract has higher ones.
    """
    length = int(RATE * generator.uniform(0.12, 0.3))
    glide = pitch * (1 + 0.15 * generator.standard_normal() * np.linspace(-1, 1, length))
    phase = 2 * np.pi * np.cumsum(glide) / RATE
    formants = tract * VOWELS[generator.integers(len(VOWELS))]
    harmonics = np.arange(1, int(4000 / pitch))
    distance = harmonics[:, None] * pitch - formants
    amplitude = (np.array([1.0, 0.5, 0.25]) / (1 + (distance / 90) ** 2)).sum(1) / np.sqrt(harmonics)
    vowel = (amplitude[:, None] * np.sin(harmonics[:, None] * phase)).sum(0) * np.hanning(length)
    burst = np.diff(generator.standard_normal(int(RATE * generator.uniform(0.02, 0.08)))) * 0.15
    return np.concatenate([burst * np.hanning(len(burst)), vowel])


def utterance(generator: np.random.Generator, pitch: float, tract: float, seconds: float) -> np.ndarray:
    """Syllables and pauses, ``seconds`` long, as samples in [-1, 1]."""
    pieces = []
    while sum(map(len, pieces)) < RATE * seconds:
        pieces.append(syllable(generator, pitch, tract))
        if generator.random() < 0.2:
            pieces.append(np.zeros(int(RATE * generator.uniform(0.05, 0.25))))
    samples = np.concatenate(pieces)[: int(RATE * seconds)]
    samples = 0.6 * samples / np.abs(samples).max()
    return samples + 0.003 * generator.standard_normal(len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--voices", type=int, default=6)
    parser.add_argument(
        "--utterances", type=int, default=12, help="utterances of each voice; every sixth is for validation"
    )
    args = parser.parse_args()
    generator = np.random.default_rng(2022)
    total = 0.0
    for voice in range(args.voices):
        pitch, tract = generator.uniform(90, 240), generator.uniform(0.9, 1.2)
        for number in range(args.utterances):
            subset = "dev-clean" if number % 6 == 5 else "train-clean-100"
            folder = args.out / subset / str(100 + voice) / "1"
            folder.mkdir(parents=True, exist_ok=True)
            seconds = generator.uniform(2.2, 5)
            samples = utterance(generator, pitch, tract, seconds)
            soundfile.write(folder / f"{100 + voice}-1-{number:04d}.flac", samples, RATE)
            total += seconds
    print(f"{args.out}: {args.voices * args.utterances} utterances of {args.voices} voices, {total:.0f} s")


if __name__ == "__main__":
    main()
