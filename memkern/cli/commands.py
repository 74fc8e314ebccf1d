"""The commands: each takes arguments, prints lines, writes files, and returns an exit status."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..info import info
from ..policy import Policy
from ..presets import DEFAULT_POLICIES, PRESETS, Preset
from .options import EMBEDDED


def _info(options: argparse.Namespace) -> int:
    found = info()
    print(json.dumps(asdict(found), indent=2) if options.json else found)
    return 0


def _presets(options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps([_described(row) for row in PRESETS.values()], indent=2, ensure_ascii=False))
        return 0
    width = max(len(row.usage) for row in PRESETS.values())
    for row in PRESETS.values():
        print(f"{row.usage:<{width}}  {row.summary}\n{'':<{width}}  {row.equation}")
    return 0


def _described(preset: Preset) -> dict[str, object]:
    """A preset as JSON; its policy is None if a number has no default."""
    complete = all(one.default is not None for one in preset.parameters)
    policy = json.loads(Policy.parse(preset.name).to_json()) if complete else None
    return {"name": preset.usage, "summary": preset.summary, "equation": preset.equation, "policy": policy}


def _support(options: argparse.Namespace) -> int:
    from ..pipelines import support

    try:
        found = support(_load(options))
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("support", error)
    print(found)
    return 0 if found else 1


def _explore(options: argparse.Namespace) -> int:
    from ..explore import serve

    try:
        serve(_load(options), options.model, host=options.host, port=options.port, browser=not options.no_browser)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("explore", error)
    return 0


def _audit(options: argparse.Namespace) -> int:
    from .. import audit

    given = {name: value for name, value in vars(options).items() if name not in ("command", "policy", "lora")}
    given |= {"policies": options.policy or DEFAULT_POLICIES, "loras": options.lora}
    try:
        print(audit.run(**given))
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("audit", error)
    return 0


def _screen(options: argparse.Namespace) -> int:
    from .. import audit

    given = {name: value for name, value in vars(options).items() if name not in ("command", "lora")}
    try:
        found = audit.screen(**given, loras=options.lora)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("screen", error)
    if found is not None:
        print(f"{found}\n{found.path}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from .. import audit

    given = {name: value for name, value in vars(options).items() if name not in ("command", "lora", "policy")}
    if options.policy:
        given["policies"] = options.policy
    try:
        print(audit.sweep(**given, loras=options.lora))
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("sweep", error)
    return 0


def _tune(options: argparse.Namespace) -> int:
    from ..tuning import tune

    try:
        pipe, policies = _load(options), _policies(options)
        sizes, images = options.size or [None], options.images or [1]
        found, table = tune(pipe, sizes, images, policies, guidance=not options.no_guidance)
    except (OSError, TypeError, ValueError, ImportError) as error:
        return _failed("tune", error)
    print("\n".join(map(str, found)), table.path, sep="\n")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ..benchmark import bench

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


def _demo(options: argparse.Namespace) -> int:
    try:
        return (
            _exhibit(options)
            if options.model == EMBEDDED and not (options.prompt or options.lora)
            else _demonstrate(options)
        )
    except (OSError, TypeError, ValueError) as error:
        return _failed("demo", error)


def _exhibit(options: argparse.Namespace) -> int:
    from .. import demo

    for name in _settings(options):
        raise ValueError(
            f"--{name}: only with --prompt, --model or --lora; the embedded model's captions have their own"
        )
    pipe, policies = demo.load(), _policies(options)
    results = demo.exhibit(pipe, policies, options.out, seeds=options.seeds)
    roles = _write_roles(demo.roles_table(pipe, [caption for caption, _ in demo.memorized()], policies), options)
    if options.json is not None:
        options.json.write_text(json.dumps(demo.as_json(results, options.seeds), indent=1) + "\n")
    print(
        f"{demo.table(results)}\n"
        "copies, correlation: memorized captions; a copy correlates with its training image by more than 0.9.\n"
        "colour, background, position: ordinary captions; images that show what the caption says.\n"
        "In brackets: 95 % intervals, by a bootstrap over captions.\n"
        f"\nmemorized captions: {options.out / 'memorized.png'}\nordinary captions:  {options.out / 'ordinary.png'}\n"
        f"roles and edits:    {roles}"
    )
    return 0


def _demonstrate(options: argparse.Namespace) -> int:
    from .. import demo

    if options.json is not None:
        raise ValueError("--json: only the captions of the embedded model have numbers")
    pipe, policies, prompts = _load(options), _policies(options), options.prompt or demo.PROMPTS
    grid = demo.demonstrate(pipe, prompts, policies, options.out, seeds=options.seeds, **_settings(options))
    table = demo.roles_table(pipe, prompts, policies)
    print(f"{table}\nimages:          {grid}\nroles and edits: {_write_roles(table, options)}")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Steps and guidance of `memkern demo`, as far as they were given."""
    return {name: getattr(options, name) for name in ("steps", "guidance") if getattr(options, name) is not None}


def _policies(options: argparse.Namespace) -> list[Policy]:
    return options.policy or [Policy.parse(name) for name in DEFAULT_POLICIES]


def _write_roles(table: str, options: argparse.Namespace) -> Path:
    path: Path = options.out / "roles.md"
    path.write_text(table, encoding="utf-8")
    return path


def _load(options: argparse.Namespace) -> Any:
    from ..audit import Model, Protocol, load

    made = Protocol(dtype=getattr(options, "dtype", None), device=getattr(options, "device", None))
    return load(Model(options.model, options.config, tuple(options.lora)), made)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "audit": _audit,
    "bench": _bench,
    "demo": _demo,
    "explore": _explore,
    "info": _info,
    "presets": _presets,
    "screen": _screen,
    "support": _support,
    "sweep": _sweep,
    "tune": _tune,
}
