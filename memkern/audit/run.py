"""An audit from end to end: prompts, pictures, measures, report. Resumable, and split among processes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..demo import embedded
from .methods import UNMITIGATED, method
from .metrics import metrics
from .pictures import Job, is_done, make
from .prompts import Prompt, read_prompts
from .report import write_report
from .results import rows, write_csv

EMBEDDED = "embedded"
DEFAULT_POLICIES = (UNMITIGATED, "swap-pad-zero-eot", "zero-pad:0.7")


def run(
    *,
    out: str | Path,
    model: str = EMBEDDED,
    prompts: str | Path | None = None,
    references: str | None = None,
    policies: Sequence[str] = DEFAULT_POLICIES,
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    steps: int = 20,
    guidance: float = 7.5,
    sscd: str | Path | None = None,
    clip: str | None = None,
    quiet: bool = False,
) -> Path:
    """Audit a model: how much it memorizes, and what each policy does to that and to its pictures.

    Run again with the same settings it goes on where it stopped. Under `accelerate launch` the pictures are split
    among the processes, and the first of them measures and reports.

    Args:
        out: the folder of `results.csv`, `report.html`, `grid.png`, `manifest.json` and `images/`.
        model: a diffusers folder or hub name; by default the embedded model, with its own prompts.
        prompts: a .csv, .jsonl or .txt file; see `read_prompts`.
        references: a folder or column of training images.
        policies: presets of memkern, "none" for the unpatched pipeline (always in), or alternatives: "random-tokens:4",
            "random-numbers:4", "late-guidance:0.5", "wen:3".
        seeds: of the initial noise.
        limit: how many prompts, from the start.
        steps, guidance: of the pipeline.
        sscd: SSCD's weights; clip: a CLIP model. What is not given is not measured.
        quiet: no progress bars and no lines.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError, ValueError: prompts, weights or policies that are not there or not right, a model that
            cannot be patched (with the reasons), or a folder with another audit.
        OSError: the folder cannot be written; what was made stays.
    """
    out = Path(out)
    methods = [method(name) for name in dict.fromkeys([UNMITIGATED, *policies])]
    listed = _prompts(model, None if prompts is None else Path(prompts), references, limit)
    rank, world = _place()
    measures, missing = metrics(
        sscd=None if sscd is None else Path(sscd), clip=clip, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    settings = {
        "model": model,
        "prompts": [[prompt.id, prompt.text] for prompt in listed],
        "methods": [one.name for one in methods],
        "seeds": list(seeds),
        "steps": steps,
        "guidance": guidance,
    }
    if rank == 0:
        _manifest(out, settings)
    jobs = [Job(one, prompt, seed) for one in methods for prompt in listed for seed in seeds]
    # Which are left is looked up before any is made, so that all processes split the same list.
    left = [job for job in jobs if not is_done(job.path(out))]
    _wait(world)
    mine = left[rank::world]
    if mine:
        pipe = _pipeline(model, rank)
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        with tqdm(total=len(mine), desc="pictures", unit="picture", disable=quiet or rank > 0) as bar:
            make(pipe, mine, out, options, bar.update)
    _wait(world)
    if rank > 0:
        return out / "report.html"
    broken: dict[str, str] = {}
    found = rows(out, listed, methods, list(seeds), measures, broken)
    count = len(jobs)
    table = write_csv(out / "results.csv", tqdm(found, total=count, desc="measures", unit="picture", disable=quiet))
    notes = [f"not measured: {line}" for line in missing]
    notes += [f"{len(broken)} references are no images and were skipped: {', '.join(sorted(broken))}"] if broken else []
    for line in () if quiet else notes:
        print(line)
    return write_report(out, settings, table, listed, methods, list(seeds), notes)


def _prompts(model: str, path: Path | None, references: str | None, limit: int | None) -> list[Prompt]:
    if path is not None:
        return read_prompts(path, references=references, limit=limit)
    if model != EMBEDDED:
        raise ValueError("prompts: a file of prompts is needed, but for the embedded model")
    files = json.loads((embedded.MODEL / "memorized.json").read_text(encoding="utf-8"))
    listed = [(entry["caption"], embedded.MODEL / entry["image"]) for entry in files]
    listed += [(caption, None) for caption in embedded.ordinary()]
    return [Prompt(f"{place:04d}", text, image) for place, (text, image) in enumerate(listed[:limit])]


def _pipeline(model: str, rank: int) -> Any:
    from diffusers import DiffusionPipeline

    from ..pipelines.support import support

    if model == EMBEDDED:
        pipe = embedded.load()
    else:
        on_gpu = torch.cuda.is_available()
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if on_gpu else torch.float32)
    found = support(pipe)
    if not found:
        raise ValueError(f"model: {found}")
    pipe.set_progress_bar_config(disable=True)
    if not torch.cuda.is_available():
        return pipe
    return pipe.to(f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}")


def _manifest(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings and versions; refuse a folder that holds an audit with other settings."""
    import diffusers
    import transformers

    from .. import __version__

    path = out / "manifest.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ValueError(f"out: {out} holds an audit with other {', '.join(changed)}; take another folder")
        return
    versions = {
        "memkern": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps({"settings": settings, "versions": versions, "sha256": _digest(settings)}, indent=1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"out: {out} cannot be written: {error}") from error


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        # The others wait for the slowest, which may be long.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    return int(os.environ.get("RANK", "0")), world


def _wait(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
