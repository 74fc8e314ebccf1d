"""Train the embedded model from nothing: `python train.py`. Every stage resumes where it stopped."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import dataset
import export
import tokenizer
import train_autoencoder
import train_text_encoder
import train_unet

from memkern import demo
from memkern.demo.embedded import MODEL

STAGES = {
    "data": dataset.build,
    "tokenizer": tokenizer.train,
    "text encoder": train_text_encoder.train,
    "autoencoder": train_autoencoder.train,
    "denoiser, ordinary images": train_unet.pretrain,
    "denoiser, duplicated posters": train_unet.memorize,
}
POLICIES = (
    "none",
    "swap-pad-zero-eot",
    "swap-pad",
    "zero-pad:0.4",
    "zero-pad:0.7",
    "zero-pad:1",
    "zero-eot",
    "zero-eot-pad",
    "zero-prompt",
    "prompt-from-eot",
    "pad-from-eot",
    "prompt-pad-from-eot",
    "prompt-eot-from-pad",
)
SEEDS = range(4)


def main() -> None:
    """Run the stages that are not done yet, export the model, measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded_model"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL, help="where the finished model goes")
    options = parser.parse_args()
    for name, stage in STAGES.items():
        began = time.perf_counter()
        stage(options.work)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    export.export_data(options.work, options.out)
    export.export_model(options.work, options.out)
    measure(options.out)


def measure(folder: Path) -> None:
    """Measure the model at `folder` under every policy; print the table and write `results.json` beside it."""
    pipe, posters, scenes = demo.load(folder), demo.memorized(folder), demo.scenes(folder)
    pipe.set_progress_bar_config(disable=True)
    results = demo.measure(pipe, POLICIES, posters, scenes, SEEDS)
    captions = {"memorized": [caption for caption, _ in posters], "ordinary": [scene.caption for scene in scenes]}
    cosines = {
        kind: train_text_encoder.duplication(pipe.text_encoder, pipe.tokenizer, some) for kind, some in captions.items()
    }
    numbers = demo.as_json(results, SEEDS) | {"cosine of EOT to pads": cosines}
    (folder / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{demo.table(results)}\ncosine of EOT to pads: {cosines}")


if __name__ == "__main__":
    main()
