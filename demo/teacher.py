#!/usr/bin/env python3
"""Saves a small HuBERT with random weights in Hugging Face's format, as a stand-in for a pre-trained
teacher."""

import argparse

import torch
from transformers import HubertConfig, HubertModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    torch.manual_seed(2022)
    config = HubertConfig(
        conv_dim=[64] * 7,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=512,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=8,
        initializer_range=0.05,
        layerdrop=0.0,
    )
    model = HubertModel(config)
    model.save_pretrained(args.out)
    print(f"{args.out}: a HuBERT of {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
