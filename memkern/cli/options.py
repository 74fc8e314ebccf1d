"""Types of arguments, and groups of options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..policy import Policy
from ..presets import DEFAULT_POLICIES

EMBEDDED = "embedded"


def policy(text: str) -> Policy:
    """A preset's name, or a JSON file of a policy."""
    try:
        if Path(text).suffix.lower() == ".json":
            return Policy.from_json(Path(text).read_text(encoding="utf-8"))
        return Policy.parse(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> tuple[int, int]:
    """Height and width of "WIDTHxHEIGHT"."""
    width, _, height = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a width and a height such as 512x768, got {text!r}")
    return int(height), int(width)


def seeds(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1, got {text!r}") from None


def words(text: str) -> list[str]:
    """Words, separated by commas."""
    return [word.strip() for word in text.split(",")]


def of_policies(parser: argparse.ArgumentParser, beside: str = "", as_text: bool = False) -> None:
    """`--policy`, the same for all commands; `beside` names what this one takes as well, which needs `as_text`."""
    about = f"a preset, a .json file of a policy{beside}; may be repeated (default: {', '.join(DEFAULT_POLICIES)})"
    parser.add_argument("--policy", action="append", type=str if as_text else policy, help=about)


def of_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and its options."""
    about = "a diffusers folder, hub name or .safetensors file (default: %(default)s)"
    parser.add_argument("--model", default=EMBEDDED, help=about)
    parser.add_argument("--config", help="a diffusers folder with the configuration of a .safetensors file")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")


def of_device(parser: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device`."""
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on a GPU, else float32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU, else the CPU)")


def of_protocol(parser: argparse.ArgumentParser) -> None:
    """The options for generating images; None takes the protocol's value, or the default one."""
    parser.add_argument("--protocol", help="kim-no: the paper's settings; every option here replaces a part")
    parser.add_argument("--seeds", type=seeds, help="(default: 0)")
    parser.add_argument("--steps", type=int, help="(default: 20)")
    parser.add_argument("--guidance", type=float, help="(default: 7.5)")
    parser.add_argument("--scheduler", help="one of diffusers, such as DDIM (default: the model's)")
    of_device(parser)
    parser.add_argument("--generator-device", help="of the initial noise; pipeline is the model's (default: cpu)")
    parser.add_argument("--batch", type=int, help="images at once, which changes rounding (default: 1)")
