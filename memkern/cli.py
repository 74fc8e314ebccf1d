"""The command line: `memkern info`, `memkern demo` and `memkern audit`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .info import info
from .policy import Policy

EMBEDDED = "embedded"
DEFAULT_POLICIES = ("swap-pad-zero-eot", "zero-pad:0.7")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    return _audit(options) if options.command == "audit" else _demo(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memkern", description="Stops Stable Diffusion from returning its training images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build and backends")
    demo = commands.add_parser("demo", help="the same prompts and seeds, unpatched and patched, side by side")
    demo.add_argument("--model", default=EMBEDDED, help="a diffusers folder or hub name (default: %(default)s)")
    demo.add_argument("--prompt", action="append", help="several times; default: the captions of the embedded model")
    demo.add_argument("--policy", action="append", type=_policy, help="a preset, e.g. zero-pad:0.7; several times")
    demo.add_argument("--seeds", type=_seeds, default="0,1", help="(default: %(default)s)")
    demo.add_argument("--steps", type=int, default=20, help="with --prompt or --model (default: %(default)s)")
    demo.add_argument("--guidance", type=float, default=7.5, help="with --prompt or --model (default: %(default)s)")
    demo.add_argument("--json", type=Path, help="write the numbers of the embedded model to this file")
    demo.add_argument("--out", type=Path, default=Path("memkern-demo"), help="folder (default: %(default)s)")
    _audit_parser(commands)
    return parser


def _audit_parser(commands: Any) -> None:
    about = (
        "how much a model memorizes, and what each policy does to that and to its pictures; goes on where it stopped"
    )
    audit = commands.add_parser("audit", help=about)
    audit.add_argument("--model", default=EMBEDDED, help="a diffusers folder or hub name (default: %(default)s)")
    audit.add_argument("--prompts", type=Path, help="a .csv, .jsonl or .txt file; default: those of the embedded model")
    audit.add_argument("--references", help="training images: a folder (0000.png …) or a column of the prompts' file")
    methods = "presets, none, random-tokens:4, random-numbers:4, late-guidance:0.5, wen:3 (default: %(default)s)"
    audit.add_argument("--policies", default="none,swap-pad-zero-eot,zero-pad:0.7", type=_names, help=methods)
    audit.add_argument("--seeds", type=_seeds, default="0", help="(default: %(default)s)")
    audit.add_argument("--limit", type=int, help="only so many prompts")
    audit.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    audit.add_argument("--guidance", type=float, default=7.5, help="(default: %(default)s)")
    audit.add_argument("--sscd", type=Path, help="weights of SSCD, TorchScript or .onnx")
    audit.add_argument("--clip", help="a CLIP model for the CLIP score")
    audit.add_argument("--out", type=Path, default=Path("memkern-audit"), help="folder (default: %(default)s)")


def _names(text: str) -> list[str]:
    """Comma-separated, where a preset's own numbers are too: "guard:0.2,1.5,none" is two."""
    found: list[str] = []
    for part in text.split(","):
        if found and part.replace(".", "", 1).lstrip("-").isdigit():
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _policy(text: str) -> Policy:
    try:
        return Policy.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1, got {text!r}") from None


def _audit(options: argparse.Namespace) -> int:
    from . import audit

    _hush()
    given = {name: value for name, value in vars(options).items() if name != "command"}
    try:
        print(audit.run(**given))
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"memkern audit: {error}", file=sys.stderr)
        return 1
    return 0


def _hush() -> None:
    """Bars and advice about optional packages would bury what is shown here."""
    import diffusers.utils.logging
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def _demo(options: argparse.Namespace) -> int:
    _hush()
    try:
        return _exhibit(options) if options.model == EMBEDDED and not options.prompt else _demonstrate(options)
    except (OSError, TypeError, ValueError) as error:
        print(f"memkern demo: {error}", file=sys.stderr)
        return 1


def _exhibit(options: argparse.Namespace) -> int:
    from . import demo

    pipe, policies = demo.load(), _policies(options)
    results = demo.exhibit(pipe, policies, options.out, seeds=options.seeds)
    roles = _write_roles(demo.roles_table(pipe, [caption for caption, _ in demo.memorized()], policies), options)
    if options.json is not None:
        options.json.write_text(json.dumps(demo.as_json(results, options.seeds), indent=1) + "\n")
    print(
        f"{demo.table(results)}\n"
        "copies, correlation: memorized captions; a copy correlates with its training image by more than 0.9.\n"
        "colour, background, position: ordinary captions; pictures that show what the caption says.\n"
        "In brackets: 95 % intervals, by a bootstrap over captions.\n"
        f"\nmemorized captions: {options.out / 'memorized.png'}\nordinary captions:  {options.out / 'ordinary.png'}\n"
        f"roles and edits:    {roles}"
    )
    return 0


def _demonstrate(options: argparse.Namespace) -> int:
    from . import demo

    if options.json is not None:
        raise ValueError("--json: there are numbers for the captions of the embedded model only")
    pipe, policies, prompts = _load(options.model), _policies(options), options.prompt or demo.PROMPTS
    grid = demo.demonstrate(
        pipe, prompts, policies, options.out, seeds=options.seeds, steps=options.steps, guidance=options.guidance
    )
    table = demo.roles_table(pipe, prompts, policies)
    print(f"{table}\npictures:        {grid}\nroles and edits: {_write_roles(table, options)}")
    return 0


def _policies(options: argparse.Namespace) -> list[Policy]:
    return options.policy or [Policy.parse(name) for name in DEFAULT_POLICIES]


def _write_roles(table: str, options: argparse.Namespace) -> Path:
    path: Path = options.out / "roles.md"
    path.write_text(table, encoding="utf-8")
    return path


def _load(model: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from . import demo

    if model == EMBEDDED:
        return demo.load()
    on_gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if on_gpu else torch.float32)
    return pipe.to("cuda" if on_gpu else "cpu")


if __name__ == "__main__":
    sys.exit(main())
