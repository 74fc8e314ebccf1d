"""The arguments of every command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..version import __version__
from .options import of_device, of_model, of_policies, of_protocol, seeds, size, words
from .words import Parser


def parser() -> argparse.ArgumentParser:
    """The parser of `memkern`."""
    made = Parser(prog="memkern", description="Stops Stable Diffusion from returning its training images.")
    made.add_argument("--version", action="version", version=f"memkern {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, build and backends")
    info.add_argument("--json", action="store_true", help="for programs")
    presets = commands.add_parser("presets", help="the presets, with their effects and equations")
    presets.add_argument("--json", action="store_true", help="for programs; with the documents that --policy takes")
    support = commands.add_parser("support", help="parts of a model that would be patched, and reasons against others")
    of_model(support)
    of_device(support)
    for add in (_demo, _explore, _audit, _screen, _sweep, _tune, _bench):
        add(commands)
    return made


def _demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="the same prompts and seeds, unpatched and patched, side by side")
    of_model(demo)
    demo.add_argument("--prompt", action="append", help="may be repeated; default: the captions of the embedded model")
    of_policies(demo)
    demo.add_argument("--seeds", type=seeds, default="0,1", help="(default: %(default)s)")
    demo.add_argument("--steps", type=int, help="only with --prompt, --model or --lora (default: 20)")
    demo.add_argument("--guidance", type=float, help="only with --prompt, --model or --lora (default: 7.5)")
    demo.add_argument("--json", type=Path, help="write the numbers of the embedded model to this file")
    demo.add_argument("--out", type=Path, default=Path("memkern-demo"), help="folder (default: %(default)s)")


def _explore(commands: Any) -> None:
    about = "a page in the browser: a prompt's tokens and roles, images side by side, the attention"
    explore = commands.add_parser("explore", help=about)
    of_model(explore)
    of_device(explore)
    explore.add_argument("--host", default="127.0.0.1", help="(default: %(default)s, this machine only)")
    explore.add_argument("--port", type=int, default=7860, help="0 is any free port (default: %(default)s)")
    explore.add_argument("--no-browser", action="store_true", help="print the address, and do not open it")


def _audit(commands: Any) -> None:
    about = "measure a model's memorization, and the effect of each policy on it and on images; continues if run again"
    audit = commands.add_parser("audit", help=about)
    of_model(audit)
    audit.add_argument("--prompts", type=Path, help="a .csv, .tsv, .jsonl or .txt file; default: the embedded model's")
    audit.add_argument("--references", help="training images: a folder (0000.png …) or a column of the prompts' file")
    of_policies(audit, ", random-tokens:4, random-numbers:4, late-guidance:0.5 or wen:3", as_text=True)
    audit.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    of_protocol(audit)
    audit.add_argument("--sscd", type=Path, help="weights of SSCD, TorchScript or .onnx")
    audit.add_argument("--sscd-size", type=int, help="288 or 320 (default: 320 for a file named large, else 288)")
    audit.add_argument("--clip", help="a CLIP model for the CLIP score, or open_clip:ARCHITECTURE/WEIGHTS")
    audit.add_argument("--aesthetic", type=Path, help="a linear head on the CLIP model's embedding of images")
    audit.add_argument("--lpips", type=Path, help="weights of AlexNet for LPIPS between seeds")
    audit.add_argument("--threshold", type=float, default=0.5, help="a copy's least similarity (default: %(default)s)")
    audit.add_argument("--out", type=Path, default=Path("memkern-audit"), help="folder (default: %(default)s)")


def _screen(commands: Any) -> None:
    about = "find the prompts of a list that a model memorized, most scores without an image; continues if run again"
    screen = commands.add_parser("screen", help=about)
    of_model(screen)
    screen.add_argument("--prompts", type=Path, help="as for audit; a column memorized or label is compared to scores")
    screen.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    scores = "some of pads, angle, noise, entropy, bright; the first sorts the table (default: %(default)s)"
    screen.add_argument("--scores", default="pads,angle,noise", type=words, help=scores)
    screen.add_argument("--seeds", type=seeds, default="0", help="of the noise (default: %(default)s)")
    screen.add_argument("--batch", type=int, default=8, help="prompts at once (default: %(default)s)")
    of_device(screen)
    screen.add_argument("--out", type=Path, default=Path("memkern-screen"), help="folder (default: %(default)s)")


def _sweep(commands: Any) -> None:
    about = "find the best policy for a model: copies against fidelity over a grid; continues if run again"
    sweep = commands.add_parser("sweep", help=about)
    of_model(sweep)
    sweep.add_argument("--prompts", type=Path, help="memorized and ordinary ones; default: the embedded model's")
    sweep.add_argument("--references", help="training images: a folder or a column of the prompts' file")
    sweep.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    pattern = (
        "a preset, with ranges of its numbers: zero-pad:{0.3..1.0:0.1} or ren:{1.25,2}; or several, each in layers of "
        "its own: 'zero-pad:0.9@down+mid & zero-pad:{0.4,0.6}@up'; may be repeated"
    )
    sweep.add_argument("--policy", action="append", help=pattern)
    where = "choices of blocks or layers of the edits, separated by commas: all,down+mid,up (default: %(default)s)"
    sweep.add_argument("--layers", type=words, default="all", help=where)
    when = "choices of the part of the schedule: 0-1,0-0.5 (default: %(default)s)"
    sweep.add_argument("--steps", type=words, default="0-1", help=when)
    sweep.add_argument("--seeds", type=seeds, default="0,1,2,3,4,5,6,7", help="of the sweep (default: %(default)s)")
    sweep.add_argument(
        "--check-seeds", type=seeds, default="100,101,102,103", help="of the winner (default: %(default)s)"
    )
    sweep.add_argument("--max-copies", type=float, default=0.03, help="largest share of copies (default: %(default)s)")
    sweep.add_argument("--max-loss", type=float, default=0.03, help="largest loss of fidelity (default: %(default)s)")
    sweep.add_argument("--inference-steps", type=int, help="of an image (default: 20)")
    sweep.add_argument("--guidance", type=float, help="(default: 7.5; 5 for the embedded model, as in the demo)")
    sweep.add_argument("--scheduler", help="one of diffusers, such as DDIM (default: the model's)")
    of_device(sweep)
    sweep.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    sweep.add_argument("--sscd", type=Path, help="weights of SSCD; without them copies are found by pixels")
    sweep.add_argument("--clip", help="a CLIP model; without it ordinary images are compared with the unpatched ones")
    sweep.add_argument("--threshold", type=float, default=0.5, help="a copy's least similarity (default: %(default)s)")
    sweep.add_argument("--out", type=Path, default=Path("memkern-sweep"), help="folder (default: %(default)s)")


def _tune(commands: Any) -> None:
    about = "time the ways to compute a model's cross-attention on this machine, and keep the times"
    tune = commands.add_parser("tune", help=about)
    of_model(tune)
    tune.add_argument("--size", action="append", type=size, help="WIDTHxHEIGHT; may be repeated (default: the model's)")
    tune.add_argument("--images", action="append", type=int, help="images at once; may be repeated (default: 1)")
    of_policies(tune)
    tune.add_argument("--no-guidance", action="store_true", help="without negative prompts")
    of_device(tune)


def _bench(commands: Any) -> None:
    about = "measure the cost of patching on this machine: a step, encode_prompt, host time and memory"
    bench = commands.add_parser("bench", help=about)
    of_model(bench)
    of_policies(bench)
    bench.add_argument("--compile", action="store_true", help="measure UNets compiled by torch too")
    bench.add_argument("--rounds", type=int, default=15, help="calls of each, in turn (default: %(default)s)")
    bench.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    bench.add_argument("--size", type=size, metavar="WxH", help="of the image, in pixels (default: the model's)")
    bench.add_argument("--prompt", help="its length decides how many keys are left")
    of_device(bench)
    bench.add_argument("--out", type=Path, default=Path("memkern-bench"), help="folder (default: %(default)s)")
