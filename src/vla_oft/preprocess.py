"""Camera images to the pixels that the vision towers read.

    own       image -> resize to image_size -> central crop                                           -> normalise
    imported  image -> Camera: JPEG, Lanczos to 224 -> central crop -> image processor to image_size   -> normalise

`Config` describes either; `reference_config` and `from_preprocessor_config` make the second kind.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vla_oft.images import Filter, Fit, center_crop, crop_and_resize, fit_square, jpeg_round_trip, lanczos3
from vla_oft.transfer import sent
from vla_oft_client import Observation

Triple = tuple[float, float, float]

_INTERPOLATIONS: dict[Any, Filter] = {"lanczos": "lanczos", "bicubic": "bicubic", 1: "lanczos", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True, kw_only=True)
class Camera:
    """The reference's own stage, before its image processor's.

    size: side of the square that every camera image becomes, unless it has that size already.
    resize: how: `jpeg-lanczos` compresses it first; `lanczos` does not (its data loader, whose images were JPEG files); `none` leaves that
    to the crop, or without one to the image processor: the original OpenVLA, before OFT.
    """

    size: int = 224
    resize: Literal["jpeg-lanczos", "lanczos", "none"] = "jpeg-lanczos"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that turns a raw image into model input.

    image_size: side of the towers' square images. resize: the filter that brings an image there; fit: what happens to its aspect ratio;
    letterbox_fill: RGB of the padding of `fit="letterbox"`.
    crop_area: central share of the image that is kept at inference (0.9 when training used random crops of that area, 1.0 otherwise).
    camera: the reference's stage before that, None for policies that were not imported. With it the crop comes between both stages and
    is the reference's, to the bit.
    dino_*, siglip_*: per-channel mean and standard deviation of each tower's pixels, in [0, 1] units.
    """

    image_size: int
    resize: Filter
    crop_area: float
    dino_mean: Triple = (0.485, 0.456, 0.406)
    dino_std: Triple = (0.229, 0.224, 0.225)
    siglip_mean: Triple = (0.5, 0.5, 0.5)
    siglip_std: Triple = (0.5, 0.5, 0.5)
    camera: Camera | None = None
    fit: Fit = "resize-naive"
    letterbox_fill: tuple[int, int, int] = (127, 127, 127)


def reference_config(
    *,
    image_size: int = 224,
    crop_area: float = 0.9,
    dino_mean: Triple = (0.484375, 0.455078125, 0.40625),
    dino_std: Triple = (0.228515625, 0.2236328125, 0.224609375),
    siglip_mean: Triple = (0.5, 0.5, 0.5),
    siglip_std: Triple = (0.5, 0.5, 0.5),
    fit: Fit = "resize-naive",
    letterbox_fill: tuple[int, int, int] = (127, 127, 127),
    resize: Filter = "bicubic",
    camera: Camera = Camera(),
) -> Config:
    """What the reference does with images: JPEG and Lanczos to 224 x 224, central crop, image processor to `image_size`.

    The default means and deviations are those of the published checkpoints: rounded to bfloat16 by the reference's converter.
    """
    return Config(
        image_size=image_size,
        resize=resize,
        crop_area=crop_area,
        dino_mean=dino_mean,
        dino_std=dino_std,
        siglip_mean=siglip_mean,
        siglip_std=siglip_std,
        camera=camera,
        fit=fit,
        letterbox_fill=letterbox_fill,
    )


def from_preprocessor_config(document: dict[str, Any], *, image_size: int, crop_area: float, camera: Camera = Camera()) -> Config:
    """The reference's images for a checkpoint's `preprocessor_config.json`, already parsed; `image_size` is that of its vision towers.

    The stored `tvf_*` entries win over the plain ones (`means`, `stds`, `interpolations`), as they do in the reference's processor.
    Raises ValueError naming the entry that is missing, unsupported or contradicts another.
    """
    sizes = [tuple(size) for size in _entry(document, "input_sizes")]
    if sizes != [(3, image_size, image_size)] * 2:
        raise ValueError(f"preprocessor_config: input_sizes={sizes} must be two towers' (3, {image_size}, {image_size})")
    fit = _entry(document, "image_resize_strategy")
    if fit not in get_args(Fit):
        raise ValueError(f"preprocessor_config: image_resize_strategy={fit!r} is not supported; supported: {', '.join(get_args(Fit))}")
    (dino_mean, dino_std), (siglip_mean, siglip_std) = _normalization(document)
    return reference_config(
        image_size=image_size,
        crop_area=crop_area,
        dino_mean=dino_mean,
        dino_std=dino_std,
        siglip_mean=siglip_mean,
        siglip_std=siglip_std,
        resize=_check_resize(document, fit, image_size),
        fit=fit,
        letterbox_fill=_letterbox_fill(document, fit),
        camera=camera,
    )


def prepare_image(config: Config, image: np.ndarray, fast: bool = False) -> np.ndarray:
    """Raw uint8 (H, W, 3) -> uint8 (S, S, 3). Raises ImportError when it must go through JPEG and simplejpeg is not installed.

    fast: resize as `images.resize` does it then; what the reference does is never approximated.
    """
    if config.camera is None:
        return center_crop(_fit(config, image, fast), config.crop_area)
    size, how = config.camera.size, config.camera.resize
    if how != "none" and image.shape[:2] != (size, size):
        image = lanczos3(jpeg_round_trip(image) if how == "jpeg-lanczos" else image, size)
    if config.crop_area != 1.0:
        image = crop_and_resize(image, config.crop_area, size)
    return _fit(config, image)


@dataclass(frozen=True)
class Preparation:
    """`prepare_image` of one configuration, as a dataset takes it: training then reads the pixels that inference reads.

    With random crops in training, give it the configuration with crop_area=1: they take the central crop's place.
    fast: pixels may differ from those of inference by one level (one value in 200 does), see `images.resize`.
    """

    config: Config
    fast: bool = False

    @property
    def size(self) -> int:
        """Side of the square images, pixels."""
        return self.config.image_size

    @property
    def key(self) -> str:
        """Names everything that decides the pixels: two preparations with the same key give the same images."""
        c = self.config
        parts = [f"{c.image_size}-{c.resize}-{c.crop_area!r}"]
        if c.camera is not None:
            parts.append(f"camera{c.camera.size}-{c.camera.resize}")
        if c.fit != "resize-naive":
            parts.append(c.fit)
        if c.fit == "letterbox":
            parts.append("_".join(map(str, c.letterbox_fill)))
        if self.fast and c.camera is None:
            parts.append("fast")
        return "-".join(parts)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size stay as they are."""
        return self.config.camera is None and self.config.crop_area == 1.0 and height == width == self.config.image_size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Raw uint8 (H, W, 3) -> uint8 (S, S, 3)."""
        return prepare_image(self.config, image, self.fast)


def prepare_images(config: Config, observation: Observation, cameras: tuple[str, ...]) -> np.ndarray:
    """All cameras of one observation in the policy's order -> uint8 (V, S, S, 3)."""
    return np.stack([prepare_image(config, observation.images[camera]) for camera in cameras])


def to_pixels(config: Config, images: Tensor) -> Tensor:
    """uint8 (B, V, S, S, 3) (or float in 0..255) -> float32 (B, V, 6, S, S): DINO-normalised channels, then SigLIP-normalised ones."""
    mean = sent(torch.tensor([*config.dino_mean, *config.siglip_mean]), images.device)
    std = sent(torch.tensor([*config.dino_std, *config.siglip_std]), images.device)
    channels = images.permute(0, 1, 4, 2, 3).float().repeat(1, 1, 2, 1, 1)
    return channels.sub_((255 * mean)[:, None, None]).div_((255 * std)[:, None, None])


def _fit(config: Config, image: np.ndarray, fast: bool = False) -> np.ndarray:
    return fit_square(image, config.image_size, config.fit, config.resize, config.letterbox_fill, fast)


def _entry(document: dict[str, Any], name: str) -> Any:
    if name not in document:
        raise ValueError(f"preprocessor_config: no {name!r}; found {sorted(document)}; is this OpenVLA's image processor?")
    return document[name]


def _normalization(document: dict[str, Any]) -> list[tuple[Triple, Triple]]:
    """(mean, deviation) of each of the two towers."""
    if document.get("tvf_normalize_params"):
        pairs = [(params["mean"], params["std"]) for params in document["tvf_normalize_params"]]
    else:
        pairs = list(zip(_entry(document, "means"), _entry(document, "stds"), strict=True))
    if len(pairs) != 2 or any(len(values) != 3 for pair in pairs for values in pair):
        raise ValueError(f"preprocessor_config: needs mean and std of three channels for two towers, got {pairs}")
    return [(_triple(mean), _triple(std)) for mean, std in pairs]


def _triple(values: list[float]) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _check_resize(document: dict[str, Any], fit: Fit, image_size: int) -> Filter:
    """The filter. Raises ValueError when the stored parameters are not the same for both towers or not those of `fit`."""
    params = document.get("tvf_resize_params") or [{"interpolation": name} for name in _entry(document, "interpolations")]
    filters: list[Filter | None] = [_INTERPOLATIONS.get(entry.get("interpolation")) for entry in params]
    if len(set(filters)) != 1 or filters[0] is None:
        raise ValueError(f"preprocessor_config: resizing must be bicubic or lanczos, the same for both towers, got {params}")
    square = [image_size, image_size]
    sizes = (square,) if fit == "resize-naive" else (image_size, [image_size])  # one number: that of the shorter side
    for entry in params:
        if entry.get("antialias") is False or entry.get("max_size") is not None:
            raise ValueError(f"preprocessor_config: tvf_resize_params={entry}: only antialias=true and max_size=null are supported")
        if "size" in entry and entry["size"] not in sizes:
            raise ValueError(f"preprocessor_config: image_resize_strategy={fit!r} contradicts tvf_resize_params.size={entry['size']}")
    for entry in document.get("tvf_crop_params") or ():
        if entry["output_size"] != square:
            raise ValueError(f"preprocessor_config: tvf_crop_params.output_size={entry['output_size']} must be {square}")
    return filters[0]


def _letterbox_fill(document: dict[str, Any], fit: Fit) -> tuple[int, int, int]:
    if "tvf_do_letterbox" in document and bool(document["tvf_do_letterbox"]) != (fit == "letterbox"):
        stored = document["tvf_do_letterbox"]
        raise ValueError(f"preprocessor_config: image_resize_strategy={fit!r} contradicts tvf_do_letterbox={stored}")
    if fit != "letterbox":
        return Config.letterbox_fill
    fill = document.get("tvf_letterbox_fill") or [int(255 * value) for value in _entry(document, "means")[-1]]
    red, green, blue = map(int, fill)
    return red, green, blue
