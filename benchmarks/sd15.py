"""`memkern bench` on a pipeline of Stable Diffusion 1.5's size with random weights, bfloat16.

UNet and text encoder have its configuration; the VAE, which is not measured, is tiny: `python benchmarks/sd15.py OUT`
"""

from __future__ import annotations

import sys

import torch
from bench_encode_prompt import pipeline
from bench_unet_step import unet

import memkern

if __name__ == "__main__":
    pipe = pipeline()
    pipe.unet = unet(torch.bfloat16)
    print(memkern.bench(pipe.to(torch.bfloat16), out=sys.argv[1]))
