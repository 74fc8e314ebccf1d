"""The command line: `memkern info` and `memkern demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .info import info
from .policy import Policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    return _demo(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memkern", description="Stops Stable Diffusion from returning its training images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build and backends")
    demo = commands.add_parser("demo", help="the same prompts and seed, unpatched and patched, in one picture")
    demo.add_argument("--model", help="a diffusers model: a folder or a hub name (default: a tiny one built here)")
    demo.add_argument("--prompt", action="append", help="may be given several times")
    demo.add_argument("--policy", action="append", type=_policy, help="a preset, e.g. zero-pad:0.7; several times")
    demo.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    demo.add_argument("--guidance", type=float, default=7.5, help="guidance scale (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("memkern-demo"), help="folder (default: %(default)s)")
    return parser


def _policy(text: str) -> Policy:
    try:
        policy = Policy.parse(text)
        policy.require_embeds_stage()
    except (ValueError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return policy


def _demo(options: argparse.Namespace) -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    from .demo import POLICIES, PROMPTS, demonstrate

    prompts = options.prompt or list(PROMPTS)
    policies = options.policy or [Policy.parse(name) for name in POLICIES]
    try:
        pipe = _load(options.model, prompts)
        result = demonstrate(
            pipe,
            prompts,
            policies,
            options.out,
            steps=options.steps,
            seed=options.seed,
            guidance=options.guidance,
        )
    except (OSError, TypeError, ValueError) as error:
        print(f"memkern demo: {error}", file=sys.stderr)
        return 1
    print(result.table.read_text(encoding="utf-8"))
    if options.model is None:
        print("The weights are random: the pictures show that the edits act, not what they do to a trained model.")
    print(f"pictures: {result.grid}\ntable:    {result.table}")
    return 0


def _load(model: str | None, prompts: list[str]) -> Any:
    import torch

    if model is None:
        from .demo import tiny_pipeline, train_tokenizer

        torch.set_num_threads(1)  # its tensors are too small to share
        return tiny_pipeline(train_tokenizer([*prompts, "a picture of"]))
    from diffusers import DiffusionPipeline

    on_gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if on_gpu else torch.float32)
    return pipe.to("cuda" if on_gpu else "cpu")


if __name__ == "__main__":
    sys.exit(main())
