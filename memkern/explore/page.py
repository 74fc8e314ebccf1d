"""The page: controls on the left, their effect on the right. Requests share the pipeline, and take turns."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from ..presets import PRESETS
from ..scope import BLOCKS
from . import plots
from .choice import STAGES, Choice
from .images import show
from .tokens import as_html, runs

CSS = files(__package__).joinpath("page.css").read_text(encoding="utf-8")

NAMES = [preset.name for preset in PRESETS.values() if all(one.default is not None for one in preset.parameters)]


def build(pipe: Any, loading: str, example: Choice) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        pipe: the pipeline, not patched.
        loading: Python that makes `pipe`, for the code that is shown.
        example: what the controls show at first.
    """
    import gradio

    tokenizers = [found for name in ("tokenizer", "tokenizer_2") if (found := getattr(pipe, name, None)) is not None]

    def described(*given: Any) -> tuple[str, str]:
        """The tokens and the code, or what is wrong with what was chosen."""
        try:
            choice = chosen(*given)
            policy, parts = choice.policy(), []
            for place, tokenizer in enumerate(tokenizers):
                for text, branch in ((choice.prompt, "cond"), (choice.negative, "uncond")):
                    found, cut = runs(tokenizer, text, policy, branch)  # type: ignore[arg-type]
                    number = f", text encoder {place + 1}" if len(tokenizers) > 1 else ""
                    parts.append(
                        f"<h4>{'Prompt' if branch == 'cond' else 'Negative prompt'}{number}</h4>{as_html(found)}"
                    )
                    if cut:
                        parts.append(f'<p class="notice">Not read, beyond the window: {escape(cut)}</p>')
            return "".join(parts), choice.code(loading)
        except (TypeError, ValueError) as error:
            return f'<p class="notice" role="alert">{escape(str(error))}</p>', ""

    progress = gradio.Progress()

    def generated(*given: Any, progress: Any = progress) -> tuple[Any, ...]:
        """Images of both sides, figures, and the status."""
        try:
            choice = chosen(*given)
            done, total = 0, 2 * len(choice.seeds)

            def report() -> None:
                nonlocal done
                done += 1
                progress((done, total), desc="images", unit="image")

            # First the side that may be refused.
            after = show(pipe, choice, edited=True, report=report)
            before = show(pipe, choice, edited=False, report=report)
        except (TypeError, ValueError, RuntimeError) as error:
            raise gradio.Error(str(error), duration=None) from None
        labelled = [
            [(image, f"seed {seed}") for image, seed in zip(side.images, choice.seeds, strict=True)]
            for side in (before, after)
        ]
        pair = before.probe, after.probe
        return *labelled, plots.mass(*pair), plots.maps(*pair), after.status

    with gradio.Blocks(title="memkern: explore", analytics_enabled=False) as page:
        gradio.Markdown(
            "# memkern: explore\nA prompt, its tokens by role, and images of the same seeds, unpatched and patched."
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                controls = _controls(gradio, example)
                run = gradio.Button("Generate", variant="primary")
            with gradio.Column(scale=2, min_width=300):
                tokens = gradio.HTML(label="Tokens", show_label=False, container=True, padding=True)
                with gradio.Row():
                    sides = [_gallery(gradio, name) for name in ("Unpatched", "Patched")]
                gradio.Markdown("A zeroed token still takes attention, at a logit of 0; what it adds is zero.")
                with gradio.Tabs():
                    with gradio.Tab("Attention by role"):
                        mass = gradio.Plot(label="Attention by role", show_label=False)
                    with gradio.Tab("Attention to EOT"):
                        maps = gradio.Plot(label="Attention to EOT", show_label=False)
                    with gradio.Tab("Status"):
                        status = gradio.Textbox(label="memkern.status", lines=10, buttons=["copy"])
                    with gradio.Tab("Code"):
                        code = gradio.Code(label="The patched images", language="python", interactive=False)
        triggers = [page.load, *(control.change for control in controls)]
        gradio.on(triggers, described, controls, [tokens, code], show_progress="hidden", trigger_mode="always_last")
        outputs = [*sides, mass, maps, status]
        gradio.on([run.click, controls[0].submit], generated, controls, outputs, concurrency_limit=1)
    return page


def chosen(
    prompt: str,
    negative: str,
    preset: str,
    share: float,
    amount: float,
    stage: str,
    blocks: list[str],
    first: float,
    last: float,
    seeds: str,
    count: float,
    guidance: float,
) -> Choice:
    """The page's values as a choice.

    Raises:
        ValueError: a seed that is no number, none or too many of them, or a window of steps that is empty.
    """
    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise ValueError(f"seeds: expected whole numbers such as 0, 1, got {seeds!r}") from None
    if not 1 <= len(numbers) <= 8 or min(numbers) < 0 or max(numbers) >= 2**63:
        raise ValueError(f"seeds: expected 1 to 8 whole numbers from 0 to 2**63 - 1, got {seeds!r}")
    if first >= last:
        raise ValueError(f"steps: expected a part of the schedule such as 0 to 0.5, got {first:g} to {last:g}")
    name = (preset or "").strip()
    own = share if name == "zero-pad" else None
    window = (float(first), float(last))
    return Choice(
        name, own, amount, stage, tuple(blocks), window, prompt, negative, numbers, int(count), float(guidance)
    )


def _controls(gradio: Any, example: Choice) -> list[Any]:
    """In the order of `chosen`."""
    own = "A preset, or one with numbers: guard:0.2,1.5"
    preset = gradio.Dropdown(
        NAMES, value=example.preset, label="Policy", info=own, allow_custom_value=True, render=False
    )
    controls = [
        gradio.Textbox(example.prompt, label="Prompt", lines=1, max_lines=6, submit_btn=False),
        gradio.Textbox(example.negative, label="Negative prompt"),
        preset,
    ]
    preset.render()
    controls += [
        gradio.Slider(0, 1, 0.7, step=0.05, label="r", info="of zero-pad: the share of the pads that is zeroed"),
        gradio.Slider(0, 1, 1, step=0.05, label="Strength", info="of what is zeroed: rows are scaled by 1 - strength"),
        gradio.Radio(list(STAGES), value="auto", label="Stage"),
        gradio.CheckboxGroup(list(BLOCKS), value=list(BLOCKS), label="Blocks of the UNet", info="where edits act"),
        gradio.Slider(0, 1, 0, step=0.05, label="Steps from", info="as a part of the schedule"),
        gradio.Slider(0, 1, 1, step=0.05, label="Steps to"),
        gradio.Textbox(", ".join(map(str, example.seeds)), label="Seeds", info="up to 8, with commas between"),
        gradio.Slider(1, 100, example.count, step=1, label="Denoising steps"),
        gradio.Slider(1, 20, example.guidance, step=0.5, label="Guidance"),
    ]
    return controls


def _gallery(gradio: Any, name: str) -> Any:
    options = {"columns": 2, "elem_classes": "side", "object_fit": "contain", "format": "png", "buttons": ["download"]}
    with gradio.Column(min_width=260):
        gradio.Markdown(f"#### {name}")
        return gradio.Gallery(label=name, show_label=False, interactive=False, **options)
