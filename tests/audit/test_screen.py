"""`memkern screen`: scores against their own few lines, curves, and a folder that goes on and grows."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from test_audit import ONE_THREAD, TWO

import memkern
from memkern import audit, demo
from memkern.audit.roc import Roc
from memkern.audit.scores import SCORES, Passes
from memkern.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "embedded_model"
TEXTS = [demo.memorized()[0][0], demo.ordinary()[0]]


@pytest.fixture(scope="module")
def posters(tmp_path_factory):
    """The memorized captions, labelled, among 60 posters of the same words that the model did not memorize."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        from captions import Title
    finally:
        sys.path.remove(str(EXAMPLE))
    memorized, rng = {caption for caption, _ in demo.memorized()}, random.Random(5)
    others = {Title.draw(rng).caption() for _ in range(70)} - memorized
    path = tmp_path_factory.mktemp("posters") / "posters.jsonl"
    rows = [{"prompt": text, "memorized": 1} for text in sorted(memorized)]
    rows += [{"prompt": text, "memorized": 0} for text in sorted(others)[:60]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def pipe():
    found = demo.load()
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def by_hand(pipe):
    """Each text's ε(x, ∅), ε(x, c) and ε(x, swapped c) on one noise, at the first time and the third from last."""
    pipe.scheduler.set_timesteps(50)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            cond, uncond = pipe.encode_prompt(text, "cpu", 1, True)[:2]
            with memkern.patched(pipe, "swap-pad"):
                swapped = pipe.encode_prompt(text, "cpu", 1, True)[0]
            times = pipe.scheduler.timesteps[0], pipe.scheduler.timesteps[-3]
            rows.append(
                [[pipe.unet(noise, t, c, return_dict=False)[0] for c in (uncond, cond, swapped)] for t in times]
            )
    return rows


def found(pipe, name):
    generators = [torch.Generator().manual_seed(3) for _ in TEXTS]
    return SCORES[name](Passes(pipe, TEXTS, generators, 50))


def test_noise_is_wens(pipe, by_hand):
    expected = torch.stack([(first[1] - first[0]).norm() for first, _ in by_hand])
    torch.testing.assert_close(found(pipe, "noise"), expected, rtol=1e-4, atol=1e-4)


def test_pads_is_how_far_the_swap_moves_the_first_prediction(pipe, by_hand):
    expected = torch.stack([(first[1] - first[2]).norm() for first, _ in by_hand])
    torch.testing.assert_close(found(pipe, "pads"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_angle_is_norm_and_cosine(pipe, by_hand, kind, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind))
    kept = float(pipe.scheduler.alphas_cumprod[981])
    assert pipe.scheduler.alphas_cumprod.shape == (1000,)
    expected = []
    for (u, c, _), (late_u, late_c, _) in by_hand:
        factor = 1 if kind == "epsilon" else kept**0.5 / (1 - kept)
        a, b = late_u[0].flatten(1), (late_c - late_u)[0].flatten(1)
        cosine = ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()
        expected.append((c - u).norm() * factor + {"epsilon": 2, "v_prediction": 0.1}[kind] * cosine)
    passes_first = pipe.scheduler.set_timesteps(50) or int(pipe.scheduler.timesteps[0])
    assert passes_first == 981
    torch.testing.assert_close(found(pipe, "angle"), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_entropy_is_that_of_the_attention(pipe):
    """The entropy follows from the maps of an attention computed by hand in every layer."""
    pipe.scheduler.set_timesteps(50)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)
    context = pipe.encode_prompt(TEXTS, "cpu", 1, True)[0]
    maps = []

    def before(attn, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        q, k = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(context)))
        maps.append((q @ k.transpose(-1, -2) * attn.scale).softmax(-1).mean((1, 2)))

    layers = [m for name, m in pipe.unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        pipe.unet(noise, pipe.scheduler.timesteps[0], context)
    for handle in handles:
        handle.remove()
    expected = torch.stack([-(mass * mass.log()).sum(-1) for mass in maps]).mean(0)
    torch.testing.assert_close(found(pipe, "entropy"), expected, rtol=1e-3, atol=1e-3)


def test_bright_is_the_guidance_where_the_image_ends_bright(pipe):
    """Each prompt's own generation by hand: guidance of every step, and the last attention to EOT."""
    layers = {name: layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2")}
    block = next(iter(layers)).split(".")[:2]
    first = [layer for name, layer in layers.items() if name.split(".")[:2] == block]
    expected = []
    for text in TEXTS:
        maps, end = [], int(pipe.tokenizer(text, return_tensors="pt").attention_mask.sum()) - 1

        def before(attn, args, kwargs, maps=maps, end=end):
            x, context = args[0] if args else kwargs["hidden_states"], kwargs["encoder_hidden_states"]
            q, k = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(context)))
            maps.append((q @ k.transpose(-1, -2) * attn.scale).softmax(-1).mean(1)[-1, :, end])

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in first]
        cond, uncond = pipe.encode_prompt(text, "cpu", 1, True)[:2]
        context, norms = torch.cat([uncond, cond]), []
        pipe.scheduler.set_timesteps(50)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for time in pipe.scheduler.timesteps:
                maps.clear()
                without, given = pipe.unet(torch.cat([x, x]), time, context, return_dict=False)[0].chunk(2)
                norms.append(given - without)
                x = pipe.scheduler.step(without + 7.5 * (given - without), time, x).prev_sample
        for handle in handles:
            handle.remove()
        mask = torch.stack(maps).mean(0)
        mask = mask.view(1, 1, *[round(len(mask) ** 0.5)] * 2)
        mask = torch.nn.functional.interpolate(mask, (16, 16), mode="nearest")[0, 0]
        expected.append(torch.stack([(one * mask).norm() for one in norms]).mean() / mask.mean())
    torch.testing.assert_close(found(pipe, "bright"), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_as_it_was(pipe):
    hooks = len(pipe.unet._forward_pre_hooks)
    for name in SCORES:
        found(pipe, name)
    assert len(pipe.unet._forward_pre_hooks) == hooks
    assert not memkern.status(pipe).patched


def test_few_passes(pipe):
    """The scores take at most a fifth of the rows that an image of 20 steps with guidance takes through the UNet."""
    rows = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["sample"])) if not args else None, with_kwargs=True
    )
    texts = TEXTS * 4
    passes = Passes(pipe, texts, [torch.Generator().manual_seed(0) for _ in texts], 50)
    for name in ("pads", "angle", "noise"):
        SCORES[name](passes)
    handle.remove()
    assert 0 < sum(rows) / len(texts) <= 2 * 20 / 5


def test_curves():
    roc = Roc.of([4.0, 3.0, 2.0, 2.0, 1.0], [True, False, True, False, False])
    assert (roc.positives, roc.negatives) == (2, 3)
    # Pairs of a memorized and another: 3 right of the first, 1 right and 1 equal of the second, of 6.
    assert roc.auc == pytest.approx((3 + 1.5) / 6)
    assert roc.true_at_few_false == 0.5
    assert Roc.of([1.0, 1.0], [True, False]).auc == 0.5
    assert Roc.of([1.0, 2.0], [True, True]) is None


def test_it_finds_what_the_embedded_model_memorized(posters, tmp_path):
    """Memorized captions against ordinary ones, and against posters of the same words."""
    for name, prompts in (("ordinary", None), ("posters", posters)):
        found = audit.screen(out=tmp_path / name, prompts=prompts, scores=["pads"], quiet=True)
        assert found.curves["pads"].auc >= 0.95
        assert found.curves["pads"].positives == 16


def test_what_is_written(tmp_path, capsys):
    assert main(["screen", "--limit", "20", "--scores", "noise, pads", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "noise: AUC 0." in shown
    with (tmp_path / "screen.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["prompt_id", "prompt", "label", "noise", "pads"]
    values = [float(row["noise"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row["label"] for row in rows[:20]} == {"0", "1"}
    document = json.loads((tmp_path / "screen.json").read_text())
    assert (document["pads"]["memorized"], document["pads"]["others"]) == (16, 4)
    assert (tmp_path / "roc.png").stat().st_size > 1000


def test_it_goes_on_and_grows(tmp_path, monkeypatch):
    """Cut off in mid-line, with more prompts and a seed more: only what is missing is scored."""
    options = {"scores": ["noise"], "quiet": True, "batch": 2}
    audit.screen(out=tmp_path / "once", limit=5, seeds=[0, 1], **options)
    audit.screen(out=tmp_path / "out", limit=3, seeds=[0], **options)
    lines = tmp_path / "out" / "scores" / "0.jsonl"
    lines.write_text(lines.read_text().rstrip()[:-10])
    scored = []
    original = SCORES["noise"]
    monkeypatch.setitem(SCORES, "noise", lambda passes: scored.extend(passes.texts) or original(passes))
    audit.screen(out=tmp_path / "out", limit=5, seeds=[0, 1], **options)
    assert len(scored) == 1 + 2 + 5
    for name in ("screen.csv", "screen.json"):
        once, grown = ((tmp_path / place / name).read_text() for place in ("once", "out"))
        if name == "screen.json":
            assert once == grown
        else:
            numbers = [[float(row["noise"]) for row in csv.DictReader(text.splitlines())] for text in (once, grown)]
            assert np.allclose(*numbers, rtol=1e-4), "batches of other sizes differ by rounding"
    with pytest.raises(ValueError, match="holds an audit with other scores"):
        audit.screen(out=tmp_path / "out", limit=5, **{**options, "scores": ["pads"]})


def test_two_processes(tmp_path):
    command = "screen --limit 6 --scores noise --batch 1".split()
    done = subprocess.run(
        [sys.executable, *TWO, "-m", "memkern", *command, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env=ONE_THREAD, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "screen.csv").read_bytes() == (tmp_path / "two" / "screen.csv").read_bytes()
    assert len(list((tmp_path / "two" / "scores").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scores none", "scores: expected some of pads, angle, noise, entropy, bright, got none"),
        ("--limit 0", "limit: expected at least 1 prompt, got 0"),
        ("--batch 0", "batch: expected at least 1, got 0"),
        ("--model some/model", "prompts: a file of prompts is needed"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    assert main(["screen", *arguments.split(), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
