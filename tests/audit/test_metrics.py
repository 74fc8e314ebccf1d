"""The metrics, each against a few lines of its own: tiny stand-ins for every loader; missing weights are named."""

from __future__ import annotations

import csv
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from memkern import audit, demo
from memkern.audit.metrics import Shown, Weights, metrics
from memkern.audit.metrics.diversity import Diversity
from memkern.audit.metrics.sscd import CopyDetection, size_of

SMALL = {"policies": ["zero-pad:1"], "seeds": [0], "limit": 1, "steps": 2, "quiet": True}


def table(out):
    with (out / "results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def measured(out):
    return json.loads((out / "manifest.json").read_text())["measured"]


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def shown(seed, *, text="a cat", siblings=(), reference=None):
    return Shown(noise(seed), "a dog", text, noise(seed + 100), reference, siblings)


class Describer(torch.nn.Module):
    """Stands in for SSCD: the mean colour of each quarter, and the side of its input."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        side = torch.full((pixels.shape[0], 1), float(pixels.shape[-1]))
        return torch.cat([torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1), 0 * side], 1)


def describer(path):
    torch.jit.script(Describer()).save(str(path))
    return path


def test_copy_detection_by_torchscript(tmp_path):
    weights = describer(tmp_path / "sscd.pt")
    audit.run(out=tmp_path / "out", sscd=weights, **SMALL)
    rows = table(tmp_path / "out")
    assert all(float(row["sscd_to_unmitigated"]) == pytest.approx(1) for row in rows if row["method"] == "none")
    assert all(-1 <= float(row["sscd_to_reference"]) <= 1 for row in rows)
    assert "published: SSCD / CLIP" not in (tmp_path / "out" / "report.html").read_text()
    assert measured(tmp_path / "out")["sscd"] == "sscd.pt"
    assert measured(tmp_path / "out")["sscd_size"] == 288


def test_copy_detection_by_onnx(tmp_path, monkeypatch):
    class Session:
        def __init__(self, path):
            assert path.endswith("sscd.onnx")

        def get_inputs(self):
            return [types.SimpleNamespace(name="pixels")]

        def run(self, wanted, given):
            return [Describer()(torch.from_numpy(given["pixels"])).numpy()]

    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=Session))
    (tmp_path / "sscd.onnx").write_bytes(b"x")
    found = CopyDetection(tmp_path / "sscd.onnx", None, "cpu")([shown(0, reference=noise(0)), shown(1)])
    expected = CopyDetection(describer(tmp_path / "sscd.pt"), None, "cpu")([shown(0, reference=noise(0)), shown(1)])
    assert found[0] == pytest.approx(expected[0])
    assert found[0][1] == pytest.approx(1)
    assert found[1][1] is None


@pytest.mark.parametrize(
    ("name", "size"),
    [("sscd_disc_large.torchscript.pt", 320), ("sscd_disc_mixup.torchscript.pt", 288), ("mine.onnx", 288)],
)
def test_sscds_size_is_by_its_file_or_as_asked(tmp_path, name, size):
    assert size_of(tmp_path / name) == size
    sides = []
    metric = CopyDetection(describer(tmp_path / "sscd.pt"), 320, "cpu")
    metric.describe = lambda pixels: sides.append(pixels.shape[-1]) or Describer()(pixels)
    metric([shown(0)])
    assert sides == [320]
    with pytest.raises(ValueError, match="sscd_size: expected 288 or 320, got 300"):
        CopyDetection(tmp_path / "sscd.pt", 300, "cpu")


def tiny_clip(folder):
    """A CLIP model of two layers with random weights, as a folder."""
    pipe = demo.load()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(pipe.tokenizer), "eos_token_id": pipe.tokenizer.eos_token_id},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=pipe.tokenizer).save_pretrained(folder)
    return str(folder)


def head(path):
    torch.manual_seed(1)
    state = {"weight": torch.randn(1, 8), "bias": torch.randn(1)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@torch.no_grad()
def test_clip_scores_of_both_texts_and_the_aesthetic_score(tmp_path, suffix):
    """Scores by transformers, against the model called as a whole."""
    folder, file = tiny_clip(tmp_path / "clip"), tmp_path / f"head.{suffix}"
    state = head(file)
    audit.run(out=tmp_path / "out", clip=folder, aesthetic=file, **{**SMALL, "policies": ["random-numbers:3"]})
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    for row in table(tmp_path / "out"):
        texts = [row["prompt"], row["text"]]
        assert (texts[0] == texts[1]) == (row["method"] == "none")
        image = Image.open(tmp_path / "out" / row["image"])
        out = model(**processor(text=texts, images=[image], return_tensors="pt", padding=True, truncation=True))
        original, changed = (out.text_embeds @ out.image_embeds.T)[:, 0].tolist()
        assert float(row["clip_score"]) == pytest.approx(original, abs=1e-5)
        assert float(row["clip_score_changed"]) == pytest.approx(changed, abs=1e-5)
        expected = out.image_embeds @ state["weight"].T + state["bias"]
        assert float(row["aesthetic"]) == pytest.approx(float(expected), abs=1e-4)
    assert measured(tmp_path / "out")["aesthetic"] == file.name


def test_clip_by_open_clip(monkeypatch):
    """A stand-in for the package: its three functions, and their arguments."""

    class Model(torch.nn.Module):
        def encode_image(self, pixels):
            return pixels.mean((2, 3)) * 5

        def encode_text(self, ids):
            return ids.float()

    def create(architecture, pretrained, device):
        assert (architecture, pretrained, device) == ("ViT-H-14", "folder/file.bin", "cpu")
        return Model(), None, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    package = types.SimpleNamespace(
        create_model_and_transforms=create,
        get_tokenizer=lambda architecture: lambda texts: torch.tensor([[len(t), 1, 2] for t in texts]),
    )
    monkeypatch.setitem(sys.modules, "open_clip", package)
    (_, metric), missing = metrics(Weights(clip="open_clip:ViT-H-14/folder/file.bin"), "cpu")
    ((original, changed),) = metric([shown(0, text="abc")])
    colour = np.asarray(noise(0), float).mean((0, 1))
    for found, text in ((original, "a dog"), (changed, "abc")):
        other = np.array([len(text), 1, 2])
        assert found == pytest.approx(colour @ other / np.linalg.norm(colour) / np.linalg.norm(other), abs=1e-5)
    assert metric([shown(0, text=None)])[0][1] is None, "an unknown text is not guessed"
    assert not any("CLIP" in line for line in missing)


def test_a_head_of_another_clip(tmp_path):
    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="aesthetic: the head is of 7 numbers, the CLIP model's embedding has 8"):
        audit.run(out=tmp_path / "out", clip=tiny_clip(tmp_path / "clip"), aesthetic=tmp_path / "head.pth", **SMALL)
    torch.save({"w": torch.zeros(1, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r'other.pth: expected "weight" \[1, D\] and "bias" \[1\], got'):
        metrics(Weights(clip=str(tmp_path / "clip"), aesthetic=tmp_path / "other.pth"), "cpu")


def alexnet():
    """The layers of torchvision's AlexNet, with random weights."""
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    return torch.nn.Sequential(
        conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2),
        conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu(),
        conv(256, 256, 3, padding=1), relu(),
    )  # fmt: skip


@pytest.fixture
def lpips(monkeypatch):
    """The package, with torchvision's one function that it calls; nothing is downloaded."""

    def made(pretrained):
        assert not pretrained
        return types.SimpleNamespace(features=alexnet())

    models = types.ModuleType("torchvision.models")
    models.alexnet = made
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    ndimage = types.ModuleType("scipy.ndimage")
    ndimage.zoom = None
    for name, module in (("torchvision", torchvision), ("torchvision.models", models), ("scipy.ndimage", ndimage)):
        monkeypatch.setitem(sys.modules, name, module)
    return pytest.importorskip("lpips")


@torch.no_grad()
def test_diversity_is_lpips_over_the_other_seeds(tmp_path, lpips):
    """Unit-normalized features of five layers, squared differences under the package's own heads, by hand."""
    torch.manual_seed(0)
    features = alexnet()
    file = tmp_path / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    metric = Diversity(file, "cpu")
    siblings = (noise(1), noise(2))
    (found,), (alone,) = metric([shown(0, siblings=siblings), shown(0)])
    assert alone is None
    heads = [layer.model[-1].weight[0, :, 0, 0] for layer in metric.distance.lins]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def described(image):
        pixels = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
        x = ((torch.from_numpy(pixels) - shift) / scale).permute(2, 0, 1)[None]
        layers = []
        for place, layer in enumerate(features):
            x = layer(x.clone())
            if place in (1, 4, 7, 9, 11):
                layers.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return layers

    own = described(noise(0))
    distances = [
        sum(
            float(((a - b) ** 2 * head.view(1, -1, 1, 1)).sum(1).mean())
            for a, b, head in zip(own, described(other), heads, strict=True)
        )
        for other in siblings
    ]
    assert found == pytest.approx(np.mean(distances), rel=1e-4)
    assert found > 0
    assert metric.described == {"lpips": "alexnet.pth", "lpips_size": 256}
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected AlexNet's weights, 'features.0.bias' is not among them"):
        Diversity(tmp_path / "other.pth", "cpu")


def test_what_is_not_given_is_named(tmp_path):
    audit.run(out=tmp_path, **SMALL)
    named = measured(tmp_path)["not_measured"]
    assert [line.partition(":")[0] for line in named] == ["SSCD", "CLIP score", "aesthetic score", "LPIPS diversity"]
    page = (tmp_path / "report.html").read_text()
    assert all(f"not measured: {line.partition(':')[0]}" in page for line in named)


def test_shares_above_a_threshold(tmp_path):
    audit.run(out=tmp_path, threshold=0.9, **{**SMALL, "seeds": [0, 1], "steps": 10})
    rows = table(tmp_path)
    for row in rows:
        for name in ("pixels_to_unmitigated", "pixels_to_reference"):
            assert int(row[f"{name}_above"]) == (float(row[name]) > 0.9)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["threshold"] == 0.9
    for method in ("none", "zero-pad:1"):
        own = [int(row["pixels_to_reference_above"]) for row in rows if row["method"] == method]
        assert found["methods"][method]["pixels_to_reference"]["above"] == np.mean(own)


def test_both_metrics_and_the_published_row(tmp_path):
    """With SSCD and CLIP the page has the paper's numbers beside the user's."""
    options = {
        "sscd": describer(tmp_path / "sscd.pt"),
        "clip": tiny_clip(tmp_path / "clip"),
        "policies": ["zero-pad:0.7"],
    }
    audit.run(out=tmp_path / "out", **{**SMALL, **options})
    assert all(-1 <= float(row["clip_score"]) <= 1 for row in table(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "published: SSCD / CLIP" in page
    assert "<td>0.10 / 0.31</td>" in page
    assert page.count("data:image/png;base64,") == 2
