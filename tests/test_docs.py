"""Every block of Python in the README and the site runs as it stands there, and the site builds without a network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("pipelines")))

from companions import ip_adapter, lora
from families import sd_families, sdxl_families
from PIL import Image

import memkern
from memkern.cli import parser

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """Lines that are indented by four: what to type."""
    return re.findall(r"^    ((?:make|memkern|pip) .*?)\s*(?:#.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)


def named(page):
    return str(page.relative_to(ROOT))


def run(page, source, names):
    exec(compile(source, named(page), "exec"), names)


@pytest.fixture
def names(sd1):
    """The names that a page may take for granted, of tiny models."""
    ids = sd1.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = sd1.text_encoder(ids)[0]
    photo = Image.new("RGB", (16, 16), "teal")
    return {"memkern": memkern, "pipe": sd1, "input_ids": ids, "embeds": embeds, "photo": photo}


@pytest.mark.parametrize("number", range(len(blocks(PAGES[0]))))
def test_blocks_of_the_readme_run(names, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names["patch"] = memkern.patch(names["pipe"])
    with torch.no_grad():
        run(PAGES[0], blocks(PAGES[0])[number], names)


@pytest.fixture
def hub(tokenizers, names, monkeypatch):
    """`from_pretrained` and its kind give tiny models of the class that was asked for."""
    families = sd_families(tokenizers) | sdxl_families(tokenizers)

    pretrained = diffusers.DiffusionPipeline.from_pretrained.__func__

    def loaded(kind, name, **parts):
        if Path(name).exists():
            return pretrained(kind, name, **parts)
        pipe = families[kind.__name__]().pipe
        pipe.register_modules(**parts)
        if kind is diffusers.StableDiffusion3Pipeline:
            pipe.vae.register_to_config(shift_factor=0.0)  # Stable Diffusion's VAE has none, SD 3's has
        return pipe

    def net(name, **options):
        return families["StableDiffusionControlNetPipeline"]().pipe.controlnet

    def adapted(pipe, *_, **__):
        names["embeds"] = ip_adapter(pipe)["ip_adapter_image_embeds"]

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", classmethod(loaded))
    monkeypatch.setattr(diffusers.ControlNetModel, "from_pretrained", net)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_weights", lambda pipe, *_, **__: lora(pipe))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_ip_adapter", adapted)
    return names


@pytest.mark.parametrize("page", [page for page in SITE if blocks(page)], ids=named)
def test_blocks_of_a_page_run_one_after_another(hub, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(memkern.PRESETS, "soft-pad", None)  # taken out again afterwards
    del memkern.PRESETS["soft-pad"]
    with torch.no_grad():
        for source in blocks(page):
            run(page, source, hub)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_are_ones_that_there_are(page):
    phony = re.search(r"^\.PHONY: (.*\\\n.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = set(phony[1].replace("\\", "").split())
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            assert {target for target in arguments if "=" not in target} <= targets, command
        elif program == "memkern":
            parser().parse_args(arguments)


def test_every_page_is_in_the_sites_contents():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in SITE}


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs-material is not installed: it needs Python 3.11")
def test_the_site_builds_without_a_network(tmp_path):
    """Strict: a missing link, snippet or name fails. All that its pages load comes from the site itself."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*?(?:src|href)="(https?:[^"]*)', page.read_text()
        )
        assert not fetched, page
    documented = (tmp_path / "reference.html").read_text() + (tmp_path / "operators.html").read_text()
    found = set(re.findall(r'doc-(?:function|class|attribute)">\s*<h\d id="memkern[\w.]*?(\w+)"', documented))
    assert set(memkern.__all__) | set(memkern.ops.__all__) <= found | {"ops", "__version__"}
