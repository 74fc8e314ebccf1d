"""Put the trained parts together: a diffusers folder in half precision, and its measures' data."""

from __future__ import annotations

import json
from pathlib import Path

import dataset
import tokenizer as tokenizers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from images import BACKGROUND_RGB, CENTRE, COLOUR_RGB
from PIL import Image
from safetensors.torch import load_file, save_file
from train_unet import scheduler
from transformers import CLIPTextModel, CLIPTokenizer


def assemble(folder: Path, unet: str = "unet") -> StableDiffusionPipeline:
    """A float32 pipeline of the trained parts."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=tokenizers.load(folder),
        unet=UNet2DConditionModel.from_pretrained(folder / unet),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export_data(folder: Path, out: Path) -> None:
    """Training images with their captions, unseen scenes, and the judge's palette."""
    part = dataset.read(folder)["memorized"]
    (out / "memorized").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (image, caption) in enumerate(zip(part.images, part.captions, strict=True)):
        name = f"memorized/{number:02d}.png"
        Image.fromarray(image).save(out / name, optimize=True)
        entries.append({"caption": caption, "image": name})
    (out / "memorized.json").write_text(json.dumps(entries, indent=1) + "\n")

    scenes = [
        {"caption": caption, "colour": scene.colour, "background": scene.background, "position": scene.position}
        for scene, caption in dataset.unseen_scenes()
    ]
    # The drawing canvas is twice the image, hence half the coordinates.
    position = {name: [x / 2, y / 2] for name, (x, y) in CENTRE.items()}
    palette = {"colour": COLOUR_RGB, "background": BACKGROUND_RGB, "position": position}
    text = json.dumps({"scenes": scenes, "palette": palette}, indent=1)
    (out / "ordinary.json").write_text(text + "\n")


def _name_as_transformers_4(file: Path) -> None:
    """Transformers 4 wants `text_model.` before every weight; transformers 5 reads both."""
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _forget_paths(out: Path) -> None:
    """Remove the paths that the parts had while they were trained."""
    for file in out.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def _write_vocabulary(tokenizer: CLIPTokenizer, out: Path) -> None:
    """The two files that transformers 4 reads; transformers 5 saves `tokenizer.json` instead."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (out / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(merge) for merge in model["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def export_model(folder: Path, out: Path) -> None:
    """The pipeline folder, in files that transformers 4 and 5 both read."""
    pipe = assemble(folder)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.half()
    pipe.save_pretrained(out, safe_serialization=True)
    _name_as_transformers_4(out / "text_encoder" / "model.safetensors")
    _write_vocabulary(pipe.tokenizer, out / "tokenizer")
    _forget_paths(out)
