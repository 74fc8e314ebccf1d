"""The model of an audit: embedded, a folder, a hub name, a single file, or a loaded pipeline."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import status
from ..demo import embedded
from ..pipelines.support import support
from .files import check_file
from .protocol import DTYPES, Protocol, device, scheduler_class

EMBEDDED = "embedded"
SINGLE = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Model:
    """The origin of a pipeline.

    Attributes:
        source: "embedded", a diffusers folder or hub name, a `.safetensors` file of a whole checkpoint (A1111's),
            or a loaded pipeline, which is used as it is.
        config: a diffusers folder or hub name with the configuration of a single file; by default diffusers finds it on
            the hub.
        loras: `.safetensors` files, "FILE" or "FILE:weight".
    """

    source: Any = EMBEDDED
    config: str | None = None
    loras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for lora in self.loras:
            _lora(lora)
        if not isinstance(self.source, (str, Path)):
            _check_loaded(self)
            return
        path = Path(self.source)
        if path.suffix.lower() in PICKLED:
            raise ValueError(f"model: {path}: a {path.suffix} file can run code; expected one of {SINGLE}")
        if self.single:
            check_file("model", path)
        if self.config is not None and not self.single:
            raise ValueError(f"config: only a single {SINGLE} file needs one; the model is {self.source}")
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise ValueError(f"model: {path} is no diffusers folder: it has no model_index.json")

    @property
    def single(self) -> bool:
        """True if it is one file."""
        return isinstance(self.source, (str, Path)) and Path(self.source).suffix.lower() == SINGLE

    @property
    def name(self) -> str:
        """The name in the manifest; for a loaded pipeline its class, origin, and a digest of its UNet."""
        if isinstance(self.source, (str, Path)):
            return str(self.source)
        origin = self.source.config.get("_name_or_path") or "memory"
        return f"{type(self.source).__name__} from {origin}, UNet {_digest(self.source.unet)}"


@contextmanager
def opened(model: Model, made: Protocol, rank: int = 0) -> Iterator[Any]:
    """The pipeline, on its device and with its scheduler, without bars and without a checker that blackens images.

    A loaded pipeline gets its own scheduler, checker and bars back afterwards.

    Raises:
        ValueError: it cannot be loaded or patched, with the reasons.
    """
    loaded = not isinstance(model.source, (str, Path))
    pipe = model.source if loaded else load(model, made, rank)
    found = support(pipe)
    if not found:
        raise ValueError(f"model: {found}")
    if loaded:
        _check_fits(pipe, made)
    before = {"scheduler": pipe.scheduler} | (
        {"safety_checker": pipe.safety_checker} if getattr(pipe, "safety_checker", None) is not None else {}
    )
    bar = getattr(pipe, "_progress_bar_config", {})
    try:
        if made.scheduler is not None:
            pipe.scheduler = scheduler_class(made.scheduler).from_config(pipe.scheduler.config)
        if "safety_checker" in before:
            pipe.safety_checker = None
        pipe.set_progress_bar_config(**{**bar, "disable": True})
        yield pipe
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)
        pipe.set_progress_bar_config(**bar)


def load(model: Model, made: Protocol, rank: int = 0) -> Any:
    """The pipeline of a named model, with its LoRAs, on its device."""
    target = device_of(made, rank)
    dtype = DTYPES[made.dtype or default_dtype(model, target.type)]
    if model.source == EMBEDDED:
        pipe: Any = embedded.load()
        pipe = pipe if dtype is torch.float32 else pipe.to(dtype)
    elif model.single:
        pipe = _single_file(Path(model.source), model.config, dtype)
    else:
        import diffusers
        from packaging.version import Version

        # The old name warns from diffusers 0.42 on; the new one is ignored before it.
        name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(model.source, **{name: dtype})
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model: {model.source}: expected a diffusers folder, hub name or {SINGLE} file; {error}"
            ) from error
    _add_loras(pipe, model.loras)
    return pipe.to(target)


def device_of(made: Protocol, rank: int = 0) -> torch.device:
    """The pipeline's device: the requested one, else a GPU for each local process, else the CPU."""
    asked = device("device", made.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.type == "cuda" and asked.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return asked


def default_dtype(model: Model, kind: str) -> str:
    """float16 on a GPU, except for the embedded model; float32 elsewhere."""
    return "float16" if kind == "cuda" and model.source != EMBEDDED else "float32"


def settings_of(model: Model, made: Protocol) -> dict[str, Any]:
    """The manifest's settings of a model and a protocol, except the seeds."""
    loaded = not isinstance(model.source, (str, Path))
    return {
        "model": model.name,
        "config": model.config,
        "loras": list(model.loras),
        "steps": made.steps,
        "guidance": made.guidance,
        "scheduler": made.scheduler,
        "dtype": made.dtype,
        "device": model.source.device.type if loaded else device_of(made).type,
        "generator_device": made.generator_device,
        "batch": made.batch,
    }


def _single_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"model: {path} is no {SINGLE} file: {error}") from None
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise ValueError(
            f"model: {path} has no UNet in A1111's layout (model.diffusion_model.…); a LoRA goes with --lora"
        )
    # The text encoders show the family: SDXL's base has two, its refiner only the second.
    kind = next(
        (kind for prefix, kind in _KINDS.items() if any(name.startswith(prefix) for name in names)),
        "StableDiffusionPipeline",
    )
    local = config is not None and Path(config).is_dir()
    try:
        return getattr(diffusers, kind).from_single_file(
            str(path), config=config, torch_dtype=dtype, local_files_only=local
        )
    except OSError as error:
        raise ValueError(f"model: {path}: {error}; with --config FOLDER nothing is looked up") from error


_KINDS = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.": "StableDiffusionXLImg2ImgPipeline",
    "model.diffusion_model.joint_blocks.": "StableDiffusion3Pipeline",
}


def _lora(text: str) -> tuple[Path, float]:
    """The file and weight of "FILE" or "FILE:weight"."""
    name, colon, number = text.rpartition(":")
    path, weight = Path(text), 1.0
    if colon and not path.is_file():
        path = Path(name)
        try:
            weight = float(number)
        except ValueError:
            path = Path(text)
        if not math.isfinite(weight):
            raise ValueError(f"lora: expected a finite weight after the colon, got {text!r}")
    check_file("lora", path)
    if path.suffix.lower() != SINGLE:
        raise ValueError(f"lora: expected a {SINGLE} file, got {path}")
    return path, weight


def _add_loras(pipe: Any, loras: Sequence[str]) -> None:
    weights = {}
    for place, (path, weight) in enumerate(map(_lora, loras)):
        weights[f"lora_{place}"] = weight
        try:
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=f"lora_{place}", local_files_only=True
            )
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"lora: {path} does not fit {type(pipe).__name__}: {error}") from error
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))


def _check_loaded(model: Model) -> None:
    if not hasattr(model.source, "components"):
        raise TypeError(
            f"model: expected {EMBEDDED!r}, a folder, hub name or file, or a diffusers pipeline, got {model.source!r}"
        )
    if model.config is not None or model.loras:
        raise ValueError("config, loras: a loaded pipeline has its own; load them into it first")
    if status(model.source).patched:
        raise ValueError(
            "model: the pipeline is patched already, and an audit patches it itself; memkern.unpatch(pipe)"
        )


def _check_fits(pipe: Any, made: Protocol) -> None:
    if made.dtype is not None and pipe.unet.dtype != DTYPES[made.dtype]:
        raise ValueError(f"dtype: the pipeline is {pipe.unet.dtype}, not {made.dtype}; call pipe.to first")
    if made.device is not None and pipe.device.type != torch.device(made.device).type:
        raise ValueError(f"device: the pipeline is on {pipe.device}, not {made.device}; call pipe.to first")


def _digest(unet: torch.nn.Module) -> str:
    """A digest of names, shapes and each tensor's first values: tells two models apart without reading gigabytes."""
    found = hashlib.sha256()
    for name, value in unet.state_dict().items():
        first = value.detach().flatten()[:8].to("cpu", torch.float32)
        found.update(f"{name} {tuple(value.shape)} {first.tolist()}".encode())
    return found.hexdigest()[:12]
