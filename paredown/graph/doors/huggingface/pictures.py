"""Pictures -> a model's inputs, by the image processor of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface.loaded import library, offline, reason

COLUMN = "image"
FILES = ("preprocessor_config.json", "processor_config.json")
SHAPES = ((200, 300), (300, 200))  # of pictures that must come out alike
MISSING = (
    "the folder has no image processor (preprocessor_config.json); samples with pixel_values can "
    "be given, pictures cannot: save the processor into the folder with its save_pretrained"
)
TORCHVISION = (
    "its image processor is written for torchvision, which paredown does not install; install the "
    "one that fits your torch, or give pixel_values in the samples"
)


@dataclass(frozen=True)
class Pictures:
    """From a dict with a picture under "image", (H, W, C) of uint8, to the model's inputs.

    Attributes:
        names: the inputs that the model takes of the processor's.
        size: height and width that all are resized to, where the processor keeps their shapes.
    """

    processor: Any
    names: tuple[str, ...]
    size: tuple[int, int] | None = None

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        if COLUMN not in raw:
            raise UserError(
                f"samples: hold {', '.join(raw) or 'no column'}; expected a picture under {COLUMN}."
            )
        how: dict[str, Any] = {}
        if self.size is not None:
            how["size"] = {"height": self.size[0], "width": self.size[1]}
        made = self.processor(
            images=coloured(np.asarray(raw[COLUMN])),
            return_tensors="pt",
            input_data_format="channels_last",
            **how,
        )
        return {name: made[name][0] for name in self.names}


def coloured(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), of one that is grey or has a fourth channel.

    Raises:
        UserError: it is no picture.

    Example:
        >>> coloured(np.zeros((4, 5), np.uint8)).shape
        (4, 5, 3)
    """
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
        raise UserError(
            f"samples: {COLUMN}: expected a picture (height, width, channels) of uint8, got "
            f"{picture.dtype} of shape {picture.shape}."
        )
    channels = picture.shape[2] if picture.ndim == 3 else 1
    if channels not in (1, 3, 4):
        raise UserError(
            f"samples: {COLUMN}: expected 1, 3 or 4 channels in the last place, got a picture of "
            f"shape {picture.shape}."
        )
    if channels == 1:
        return np.repeat(picture.reshape(*picture.shape[:2], 1), 3, axis=2)
    return picture[..., :3]


def usage(made: Pictures) -> str:
    """The same in a few lines, for whoever has the folder and not this package."""
    size = f", size={dict(zip(('height', 'width'), made.size, strict=True))}" if made.size else ""
    return f"""import numpy as np
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained(".")
picture = np.zeros((480, 640, 3), "uint8")  # height, width, colours
inputs = dict(processor(images=picture, return_tensors="np"{size}))
inputs = {{name: inputs[name] for name in {list(made.names)}}}"""


def processor(path: Path) -> Any | None:
    """The folder's image processor; None where there is none.

    Raises:
        UserError: it is damaged, or needs what is not installed.
    """
    if not any((path / name).is_file() for name in FILES):
        return None
    hf = library()
    try:
        with offline():
            made = hf.AutoImageProcessor.from_pretrained(
                path.resolve(), local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except Exception as error:
        if "torchvision" in str(error).lower():
            raise UserError(f"{TORCHVISION}.") from error
        raise UserError(f"its image processor cannot be read: {reason(error)}.") from error
    return made


def fixed(made: Pictures) -> tuple[Pictures, str | None]:
    """The same, giving one shape for all pictures; a sentence where that took something.

    Raises:
        UserError: it makes no inputs of one picture, or none of one shape.
    """
    name = type(made.processor).__name__
    try:
        if len({_shape(made, sides) for sides in SHAPES}) == 1:
            return made, None
        sizes: Any = getattr(made.processor, "size", None) or {}
        side = int(sizes.get("shortest_edge") or sizes.get("height") or 0)
        square = Pictures(made.processor, made.names, (side, side))
        one_shape = side > 0 and len({_shape(square, sides) for sides in SHAPES}) == 1
    except Exception as error:
        raise UserError(
            f"its {name} makes no {made.names[0]} of one picture ({reason(error)}); give them in "
            "the samples."
        ) from error
    if not one_shape:
        raise UserError(
            f"its {name} gives each picture a shape of its own; give it one size "
            '({"height": ..., "width": ...}) and save it into the folder.'
        )
    return square, (
        f"its image processor keeps the proportions of each picture; here all are resized to "
        f"{side} x {side}, which a file of one shape needs"
    )


def grey() -> np.ndarray:
    """A picture in which all is somewhere between the darkest and the brightest."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3))
    return noise.astype(np.uint8)


def _shape(made: Pictures, sides: tuple[int, int]) -> tuple[int, ...]:
    values = made({COLUMN: np.zeros((*sides, 3), np.uint8)})
    return tuple(next(iter(values.values())).shape)
