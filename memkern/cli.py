"""The command line: `memkern info`, `demo`, `audit`, `screen`, `sweep`, `tune` and `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .info import info
from .policy import Policy
from .presets import DEFAULT_POLICIES

EMBEDDED = "embedded"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    commands = {"audit": _audit, "bench": _bench, "demo": _demo, "screen": _screen, "sweep": _sweep, "tune": _tune}
    return commands[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memkern", description="Stops Stable Diffusion from returning its training images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build and backends")
    demo = commands.add_parser("demo", help="the same prompts and seeds, unpatched and patched, side by side")
    _model_options(demo)
    demo.add_argument("--prompt", action="append", help="several times; default: the captions of the embedded model")
    demo.add_argument("--policy", action="append", type=_policy, help="a preset, e.g. zero-pad:0.7; several times")
    demo.add_argument("--seeds", type=_seeds, default="0,1", help="(default: %(default)s)")
    demo.add_argument("--steps", type=int, default=20, help="with --prompt or --model (default: %(default)s)")
    demo.add_argument("--guidance", type=float, default=7.5, help="with --prompt or --model (default: %(default)s)")
    demo.add_argument("--json", type=Path, help="write the numbers of the embedded model to this file")
    demo.add_argument("--out", type=Path, default=Path("memkern-demo"), help="folder (default: %(default)s)")
    _audit_parser(commands)
    _screen_parser(commands)
    _sweep_parser(commands)
    _tune_parser(commands)
    _bench_parser(commands)
    return parser


def _audit_parser(commands: Any) -> None:
    about = (
        "how much a model memorizes, and what each policy does to that and to its pictures; goes on where it stopped"
    )
    audit = commands.add_parser("audit", help=about)
    _model_options(audit)
    audit.add_argument("--prompts", type=Path, help="a .csv, .tsv, .jsonl or .txt file; default: the embedded model's")
    audit.add_argument("--references", help="training images: a folder (0000.png …) or a column of the prompts' file")
    audit.add_argument("--policies", help="several of --policy, with commas between")
    methods = (
        "a preset, a .json file, none, random-tokens:4, random-numbers:4, late-guidance:0.5 or wen:3; several times"
    )
    audit.add_argument("--policy", action="append", help=f"{methods} (default: {', '.join(DEFAULT_POLICIES)})")
    audit.add_argument("--limit", type=int, help="only so many prompts")
    _protocol_options(audit)
    audit.add_argument("--sscd", type=Path, help="weights of SSCD, TorchScript or .onnx")
    audit.add_argument("--sscd-size", type=int, help="288 or 320 (default: 320 for a file named large, else 288)")
    audit.add_argument("--clip", help="a CLIP model for the CLIP score, or open_clip:ARCHITECTURE/WEIGHTS")
    audit.add_argument("--aesthetic", type=Path, help="a linear head on the CLIP model's embedding of images")
    audit.add_argument("--lpips", type=Path, help="weights of AlexNet for LPIPS between seeds")
    audit.add_argument("--threshold", type=float, default=0.5, help="of a copy's similarity (default: %(default)s)")
    audit.add_argument("--out", type=Path, default=Path("memkern-audit"), help="folder (default: %(default)s)")


def _screen_parser(commands: Any) -> None:
    about = "which prompts of a list a model memorized, by scores that need no image; goes on where it stopped"
    screen = commands.add_parser("screen", help=about)
    _model_options(screen)
    screen.add_argument("--prompts", type=Path, help="as for audit; a column memorized or label is compared with")
    screen.add_argument("--limit", type=int, help="only so many prompts")
    scores = "of pads, angle, noise, entropy; the first sorts the table (default: %(default)s)"
    screen.add_argument("--scores", default="pads,angle,noise", type=_words, help=scores)
    screen.add_argument("--seeds", type=_seeds, default="0", help="of the noise (default: %(default)s)")
    screen.add_argument("--batch", type=int, default=8, help="prompts at once (default: %(default)s)")
    _device_options(screen)
    screen.add_argument("--out", type=Path, default=Path("memkern-screen"), help="folder (default: %(default)s)")


def _sweep_parser(commands: Any) -> None:
    about = "which policy is best for a model: copies against fidelity over a grid; goes on where it stopped"
    sweep = commands.add_parser("sweep", help=about)
    _model_options(sweep)
    sweep.add_argument("--prompts", type=Path, help="memorized and ordinary ones; default: the embedded model's")
    sweep.add_argument("--references", help="training images: a folder or a column of the prompts' file")
    sweep.add_argument("--limit", type=int, help="only so many prompts")
    pattern = "a preset, with ranges of its numbers: zero-pad:{0.3..1.0:0.1} or ren:{1.25,2}; several times"
    sweep.add_argument("--policy", action="append", help=pattern)
    where = "choices of blocks or layers of the edits, with commas between: all,down+mid,up (default: %(default)s)"
    sweep.add_argument("--layers", type=_words, default="all", help=where)
    when = "choices of the part of the schedule: 0-1,0-0.5 (default: %(default)s)"
    sweep.add_argument("--steps", type=_words, default="0-1", help=when)
    sweep.add_argument("--seeds", type=_seeds, default="0,1", help="of the sweep (default: %(default)s)")
    sweep.add_argument(
        "--check-seeds", type=_seeds, default="100,101,102,103", help="of the winner (default: %(default)s)"
    )
    sweep.add_argument("--max-copies", type=float, default=0.03, help="share that the winner may have (%(default)s)")
    sweep.add_argument("--inference-steps", type=int, help="of an image (default: 20)")
    sweep.add_argument("--guidance", type=float, help="(default: 7.5; 5 for the embedded model, as in the demo)")
    sweep.add_argument("--scheduler", help="one of diffusers, such as DDIM (default: the model's)")
    _device_options(sweep)
    sweep.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    sweep.add_argument("--sscd", type=Path, help="weights of SSCD; without them pixels tell copies")
    sweep.add_argument("--clip", help="a CLIP model; without it ordinary images are compared with the unpatched ones")
    sweep.add_argument("--threshold", type=float, default=0.5, help="of a copy's similarity (default: %(default)s)")
    sweep.add_argument("--out", type=Path, default=Path("memkern-sweep"), help="folder (default: %(default)s)")


def _tune_parser(commands: Any) -> None:
    about = "times the ways to compute a model's cross-attention on this machine, and keeps which is the fastest"
    tune = commands.add_parser("tune", help=about)
    _model_options(tune)
    tune.add_argument("--size", action="append", type=_size, help="of images, 512x512; several times (the model's)")
    tune.add_argument("--images", action="append", type=int, help="at once; several times (default: 1)")
    tune.add_argument("--policy", action="append", type=_policy, help="that is used; several times (as in demo)")
    tune.add_argument("--no-guidance", action="store_true", help="there are no negative prompts")
    _device_options(tune)


def _bench_parser(commands: Any) -> None:
    about = "what patching costs or saves on this machine: a step, encode_prompt, host time and memory"
    bench = commands.add_parser("bench", help=about)
    _model_options(bench)
    policy = f"a preset, or none; several times (default: {', '.join(DEFAULT_POLICIES)})"
    bench.add_argument("--policy", action="append", type=_policy, help=policy)
    bench.add_argument("--compile", action="store_true", help="measure UNets compiled by torch too")
    bench.add_argument("--rounds", type=int, default=15, help="calls of each, in turn (default: %(default)s)")
    bench.add_argument("--batch", type=int, default=1, help="images at once (default: %(default)s)")
    bench.add_argument("--size", type=_size, metavar="WxH", help="of the image, in pixels (default: the model's)")
    bench.add_argument("--prompt", help="its length says how many keys are left")
    _device_options(bench)
    bench.add_argument("--out", type=Path, default=Path("memkern-bench"), help="folder (default: %(default)s)")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _model_options(parser: argparse.ArgumentParser) -> None:
    model = "a diffusers folder, hub name or .safetensors file (default: %(default)s)"
    parser.add_argument("--model", default=EMBEDDED, help=model)
    parser.add_argument("--config", help="a diffusers folder with the configuration of a .safetensors file")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="several times")


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: float16 on a GPU, else float32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU, else the CPU)")


def _protocol_options(parser: argparse.ArgumentParser) -> None:
    """What is None takes the protocol's value, or the default one."""
    parser.add_argument("--protocol", help="kim-no: how the paper made its pictures; every option here replaces a part")
    parser.add_argument("--seeds", type=_seeds, help="(default: 0)")
    parser.add_argument("--steps", type=int, help="(default: 20)")
    parser.add_argument("--guidance", type=float, help="(default: 7.5)")
    parser.add_argument("--scheduler", help="one of diffusers, such as DDIM (default: the model's)")
    _device_options(parser)
    parser.add_argument("--generator-device", help="of the initial noise; pipeline is the model's (default: cpu)")
    parser.add_argument("--batch", type=int, help="images at once, which changes rounding (default: 1)")


def _policy(text: str) -> Policy:
    try:
        return Policy.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> tuple[int, int]:
    """Height and width of "width x height"."""
    width, _, height = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a width and a height such as 512x768, got {text!r}")
    return int(height), int(width)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0,1, got {text!r}") from None


def _audit(options: argparse.Namespace) -> int:
    from . import audit

    _hush()
    given = {name: value for name, value in vars(options).items() if name not in ("command", "policy", "lora")}
    listed = [*([] if options.policies is None else audit.split(options.policies)), *(options.policy or [])]
    given |= {"policies": listed or DEFAULT_POLICIES, "loras": options.lora}
    try:
        print(audit.run(**given))
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("audit", error)
    return 0


def _screen(options: argparse.Namespace) -> int:
    from . import audit

    _hush()
    given = {name: value for name, value in vars(options).items() if name not in ("command", "lora")}
    try:
        found = audit.screen(**given, loras=options.lora)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("screen", error)
    if found is not None:
        print(f"{found}\n{found.path}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from . import audit

    _hush()
    given = {name: value for name, value in vars(options).items() if name not in ("command", "lora", "policy")}
    if options.policy:
        given["policies"] = options.policy
    try:
        print(audit.sweep(**given, loras=options.lora))
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("sweep", error)
    return 0


def _tune(options: argparse.Namespace) -> int:
    from .tuning import tune

    _hush()
    try:
        pipe, policies = _load(options), _policies(options)
        sizes, images = options.size or [None], options.images or [1]
        found, table = tune(pipe, sizes, images, policies, guidance=not options.no_guidance)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("tune", error)
    print("\n".join(map(str, found)), table.path, sep="\n")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .benchmark import bench

    _hush()
    names = ("compile", "rounds", "batch", "size", "out")
    given = {name: getattr(options, name) for name in names} | ({"prompt": options.prompt} if options.prompt else {})
    try:
        pipe = _load(options)
        found = bench(pipe, _policies(options), **given)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("bench", error)
    print(found)
    return 0


def _failed(command: str, error: Exception) -> int:
    print(f"memkern {command}: {error}", file=sys.stderr)
    return 1


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
        return (
            _exhibit(options)
            if options.model == EMBEDDED and not (options.prompt or options.lora)
            else _demonstrate(options)
        )
    except (OSError, TypeError, ValueError) as error:
        return _failed("demo", error)


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
    pipe, policies, prompts = _load(options), _policies(options), options.prompt or demo.PROMPTS
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


def _load(options: argparse.Namespace) -> Any:
    from .audit import Model, Protocol, load

    made = Protocol(dtype=getattr(options, "dtype", None), device=getattr(options, "device", None))
    return load(Model(options.model, options.config, tuple(options.lora)), made)


if __name__ == "__main__":
    sys.exit(main())
