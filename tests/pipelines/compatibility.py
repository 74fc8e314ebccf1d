"""Pipeline × companion: works, or refused and why. `python tests/pipelines/compatibility.py` writes the table.

"works" means: with edits off the patched pipeline's image is the unpatched one's, and with edits on it changes.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path

import torch

# Timed, layers as small as these are often left to their own processors. This is for subprocesses as well.
os.environ.update(MEMKERN_CHOICE="estimated", MEMKERN_CACHE="off")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from companions import COMPANIONS  # noqa: E402
from families import sd_families, sdxl_families  # noqa: E402
from vocabulary import clip_vocabulary  # noqa: E402
from ways import QUANTIZED, STAGES, WAYS, Verdict, pipelines, quantized_verdicts  # noqa: E402
from ways import verdict as verdict_of_way  # noqa: E402

import memkern  # noqa: E402
from memkern.testing import clip_tokenizer  # noqa: E402

TABLE = HERE.parents[1] / "docs" / "compatibility.md"
NOT_APPLICABLE = "–"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def verdict(make, companion) -> str:
    """The verdict of one cell; a fresh pipeline each time."""
    family = make()
    if companion is not None:
        needs_unet = companion.__name__ not in ("textual_inversion",)
        takes = inspect.signature(type(family.pipe).__call__).parameters
        if companion.__name__ == "ip_adapter" and "ip_adapter_image_embeds" not in takes:
            return NOT_APPLICABLE
        if not hasattr(family.pipe, "unet") and needs_unet:
            return NOT_APPLICABLE
        named = {"free_u": "enable_freeu", "fused_qkv": "fuse_qkv_projections"}
        if not hasattr(family.pipe, named.get(companion.__name__, "__class__")):
            return NOT_APPLICABLE
        one_encoder = getattr(family.pipe, "text_encoder_2", None) is None
        has_loader = one_encoder and hasattr(family.pipe, "load_textual_inversion")
        if companion.__name__ == "textual_inversion" and not has_loader:
            return NOT_APPLICABLE
        try:
            options = companion(family.pipe)
            expected = family(steps=3, **options)
        except Exception as error:
            print(type(family.pipe).__name__, companion.__name__, error, flush=True)
            return "not run"
    else:
        options, expected = {}, family(steps=3)
    memkern.patch(family.pipe, "none")
    if not torch.allclose(family(steps=3, **options), expected, rtol=1e-3, atol=1e-3):
        return "differs"
    memkern.patch(family.pipe, "zero-pad:0.7")
    edited = family(steps=3, **options)
    if torch.allclose(edited, expected, rtol=1e-4, atol=1e-5):
        return "no effect"
    try:
        memkern.patch(family.pipe, "zero-pad:0.7", stage="kv")
    except ValueError as error:
        reason = str(error).partition("cannot be: ")[2].partition(". A policy")[0].partition(": ")
        return f"works; kv refused: {reason[2] or reason[0]}"
    return "works" if torch.allclose(family(steps=3, **options), edited, rtol=1e-3, atol=1e-3) else "kv differs"


def render(rows: dict[str, list[str]]) -> str:
    """Markdown of pipeline → cells; the reasons of refusals are notes below."""
    lines = [
        "---",
        "hide: [navigation, toc]",
        "---",
        "",
        "# What works with what",
        "",
        "Made by `python tests/pipelines/compatibility.py` with tiny pipelines of real parts. *works*: with edits off",
        "the image is the unpatched one's, with edits on it changes, and the kv stage gives the image of the embeds",
        "stage. With a note: policies that edit embeddings work; those of keys and values are refused, and why below.",
        "–: the pipeline does not have it. *not run*: the unpatched pipeline does not run with what the test gives it.",
        "",
        f"| pipeline | alone | {' | '.join(COMPANIONS)} |",
        f"| --- |{' --- |' * (1 + len(COMPANIONS))}",
    ]
    notes: list[str] = []
    for name, cells in rows.items():
        shown = []
        for cell in cells:
            what, _, reason = cell.partition("; kv refused: ")
            if reason and reason not in notes:
                notes.append(reason)
            shown.append(f"{what} [{notes.index(reason) + 1}]" if reason else what)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]) + "\n"


def ways() -> dict[str, dict[str, dict[str, Verdict]]]:
    """Way → family → stage → verdict."""
    quantized = quantized_verdicts()
    makes = pipelines()
    pag = sd_families(dict.fromkeys(("sd1", "sd2"), makes["SD"]().pipe.tokenizer))["StableDiffusionPAGPipeline"]
    found: dict[str, dict[str, dict[str, Verdict]]] = {}
    for name in WAYS:
        for family, make in makes.items():
            if name in QUANTIZED:
                verdicts = quantized[family][name] if quantized else {}
            else:
                chosen = pag if (name, family) == ("PAG", "SD") else make
                verdicts = {stage: verdict_of_way(chosen, name, stage) for stage in STAGES}
            found.setdefault(name, {})[family] = verdicts
            print(name, family, verdicts, flush=True)
    return found


def render_ways(found: dict[str, dict[str, dict[str, Verdict]]]) -> str:
    """Markdown: a row for each way and stage; the messages where something is not so are notes below."""
    lines = [
        "",
        "## Ways to run a pipeline",
        "",
        "StableDiffusionPipeline and StableDiffusionXLPipeline, patched with `zero-pad:0.7` at each stage.",
        "*protected*: the image is that of an unpatched pipeline, run in the same way, given the edited context.",
        "*accelerated*: every cross-attention layer is computed from what is kept of the context, by estimated times",
        "(`MEMKERN_CHOICE=estimated`), since layers of this size would often be left to their own processors if they",
        "were timed; `memkern.status` says so. *told*: what is said where either is not so.",
        "",
        "| way | stage | SD protected | SD accelerated | SDXL protected | SDXL accelerated | told |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for name, families in found.items():
        for stage in STAGES:
            cells, said = [], ""
            for family in ("SD", "SDXL"):
                one = families[family].get(stage)
                if one is None or one.protected is None:
                    cells += [NOT_APPLICABLE] * 2
                    continue
                refused = one.told.startswith("refused")
                shown = "no, told" if one.told else "no, silently"
                cells.append("yes" if one.protected else "refused" if refused else shown)
                cells.append("yes" if one.accelerated else NOT_APPLICABLE if refused else shown)
                said = said or (one.told if not (one.protected and one.accelerated) else "")
            if said and said not in notes:
                notes.append(said)
            told = f"[{LETTERS[notes.index(said)]}]" if said else NOT_APPLICABLE
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} | {told} |")
    return "\n".join([*lines, "", *(f"{LETTERS[index]}. {note}" for index, note in enumerate(notes))]) + "\n"


def write(rows: dict[str, list[str]], found: dict[str, dict[str, dict[str, Verdict]]]) -> None:
    """Write the page."""
    TABLE.write_text(render(rows) + render_ways(found), encoding="utf-8")


def main() -> None:
    """Run everything, and write it down."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    tokens, merges = clip_vocabulary()
    tokenizers = {"sd1": clip_tokenizer(tokens, merges), "sd2": clip_tokenizer(tokens, merges, pad_token="!")}
    TABLE.parent.mkdir(exist_ok=True)
    rows = {}
    for name, make in {**sd_families(tokenizers), **sdxl_families(tokenizers)}.items():
        rows[name] = [verdict(make, companion) for companion in (None, *COMPANIONS.values())]
        print(name, rows[name], flush=True)
    write(rows, ways())


if __name__ == "__main__":
    main()
