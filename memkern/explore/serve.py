"""The explorer's server."""

from __future__ import annotations

from typing import Any

from ..demo import embedded
from ..demo.run import PROMPTS
from ..pipelines import support
from ..presets import DEFAULT_POLICIES
from .choice import Choice

EMBEDDED = "embedded"


def serve(
    pipe: Any,
    model: str = EMBEDDED,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    browser: bool = True,
    wait: bool = True,
) -> str:
    """Serve the page for `pipe` until it is interrupted.

    Args:
        pipe: a pipeline that `memkern.patch` takes, with a UNet.
        model: what the pipeline was loaded from, for the code that is shown.
        host: where to listen; the default is reached from this machine alone.
        port: the port, 0 for any free one.
        browser: whether to open a browser.
        wait: whether to block; otherwise it serves until the process ends.

    Returns:
        The address.

    Raises:
        ImportError: gradio or matplotlib is not installed.
        ValueError: the pipeline cannot be patched, or has no UNet; with the reasons.
        OSError: the port is taken.
    """
    found = support(pipe)
    if not found:
        raise ValueError(f"pipe: {found}")
    if not hasattr(pipe, "unet"):
        raise ValueError(f"pipe: {found.pipeline} has no UNet with cross-attention layers, which the page shows")
    try:
        import gradio
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install memkern[explore]") from None
    from .page import CSS, build

    pipe.set_progress_bar_config(disable=True)
    page = build(pipe, loading(pipe, model), example(model))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gradio.themes.Default(primary_hue="purple", **fonts)
    options = {"css": CSS, "theme": theme, "footer_links": [], "share": False, "ssr_mode": False}
    _, address, _ = page.queue(default_concurrency_limit=4).launch(
        server_name=host,
        server_port=port or _free(host),
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        **options,
    )
    print(f"memkern explore: {address} (Ctrl+C stops it)", flush=True)
    if wait:
        page.block_thread()
    return str(address)


def loading(pipe: Any, model: str) -> str:
    """Python that loads the pipeline."""
    if model == EMBEDDED:
        return "from memkern import demo\n\npipe = demo.load()"
    method = "from_single_file" if model.endswith(".safetensors") else "from_pretrained"
    name = support(pipe).pipeline
    dtype = str(pipe.unet.dtype)
    place = "" if pipe.device.type == "cpu" else f'.to("{pipe.device.type}")'
    return f"from diffusers import {name}\n\npipe = {name}.{method}({model!r}, torch_dtype={dtype}){place}"


def example(model: str) -> Choice:
    """The controls' first values: a memorized caption, where one is known."""
    if model == EMBEDDED:
        return Choice(DEFAULT_POLICIES[0], prompt=embedded.memorized()[0][0], guidance=5.0)
    return Choice(DEFAULT_POLICIES[0], prompt=PROMPTS[0])


def _free(host: str) -> int:
    """A port that is free."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
