"""Images prepared on the device are those of `preprocess.prepare_image`, value by value."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vla_oft.engine.pixels import Pixels
from vla_oft.engine.resample import Line, Resample
from vla_oft.preprocess import Camera, Config, prepare_image, reference_config

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
CAMERAS = [None, Camera(), Camera(resize="lanczos"), Camera(resize="none"), Camera(size=96)]


def photos(height: int, width: int) -> torch.Tensor:
    """A batch (3, H, W, 3): noise, ramps that are full of ties, and a scene with soft and sharp edges."""
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([255 * columns // max(width - 1, 1), 255 * rows // max(height - 1, 1), (rows + columns) % 256], -1)
    scene = np.stack([127 + 90 * np.sin(rows / 9 + columns / 13), 255 * columns / width, 255 * rows / height], -1)
    scene[height // 4 : height // 2, width // 3 : width // 2] = (220, 40, 30)
    scene += RNG.normal(0, 3, scene.shape)
    return torch.from_numpy(np.stack([RNG.integers(0, 256, scene.shape), ramps, scene.clip(0, 255)]).astype(np.uint8))


def on_the_host(config: Config, images: list[torch.Tensor]) -> np.ndarray:
    return np.stack([np.stack([prepare_image(config, image) for image in batch.numpy()]) for batch in images], 1)


def assert_same(config: Config, shapes: list[tuple[int, int]]) -> None:
    images = [photos(*shape) for shape in shapes]
    prepared = Pixels(config, shapes, CPU)(images)
    assert prepared.dtype == torch.uint8 and prepared.is_contiguous()
    np.testing.assert_array_equal(prepared.numpy(), on_the_host(config, images))


@pytest.mark.parametrize(("camera", "fit"), list(product(CAMERAS, ["resize-naive", "letterbox", "resize-crop"])))
def test_every_value_is_that_of_the_host(camera, fit):
    for method, area in product(("box", "bicubic", "lanczos"), (1.0, 0.9)):
        config = Config(image_size=64, resize=method, crop_area=area, camera=camera, fit=fit, letterbox_fill=(1, 200, 77))
        assert_same(config, [(97, 131), (64, 64), (128, 192), (131, 50)])


@pytest.mark.parametrize("config", [reference_config(), Config(image_size=224, resize="lanczos", crop_area=0.9)])
def test_cameras_of_real_sizes_in_any_order(config):
    assert_same(config, [(480, 640), (256, 256), (480, 640), (224, 224)])


@pytest.mark.parametrize("area", [0.3, 0.77, 0.999])
@pytest.mark.parametrize("camera", [None, Camera(resize="lanczos")])
def test_any_crop(camera, area):
    assert_same(Config(image_size=56, resize="bicubic", crop_area=area, camera=camera), [(57, 90)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 2)])
@pytest.mark.parametrize("fit", ["resize-naive", "letterbox"])
def test_tiny_images_become_large_ones(shape, fit):
    assert_same(Config(image_size=33, resize="lanczos", crop_area=1.0, fit=fit), [shape])
    assert_same(reference_config(image_size=33, fit=fit), [shape])


def test_images_of_the_right_size_pass_untouched():
    images = [photos(32, 32)]
    prepared = Pixels(Config(image_size=32, resize="lanczos", crop_area=1.0), [(32, 32)], CPU)(images)
    assert prepared.data_ptr() == images[0].data_ptr() and prepared.shape == (3, 1, 32, 32, 3)


class Operations(TorchDispatchMode):
    """Names of all operations, but for allocations and other views of the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func) and "_unsafe_view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Config(image_size=64, resize="lanczos", crop_area=0.9), 27),
        (reference_config(image_size=64, camera=Camera(size=64, resize="lanczos")), 49),
        (reference_config(image_size=48, camera=Camera(size=64)), 100),
    ],
)
def test_a_graph_can_hold_a_call_because_it_never_looks_at_pixels(config, most):
    """Tensors of the meta device have no values: whatever fetched one, or made a tensor of another device, would fail."""
    meta, shapes = torch.device("meta"), [(120, 160), (120, 160)]
    with Operations() as operations:
        pixels = Pixels(config, shapes, meta)
        operations.names.clear()
        prepared = pixels([torch.empty((2, *shape, 3), dtype=torch.uint8, device=meta) for shape in shapes])
    assert prepared.shape == (2, 2, config.image_size, config.image_size, 3)
    assert 5 < len(operations.names) <= most, operations.names


@pytest.mark.parametrize("axes", [(1, 2), (2, 1)])
def test_the_order_of_both_passes_matters_so_pillow_is_asked(axes):
    rows, columns = Line(size=60, out=20), Line(size=40, out=90)
    image = photos(60, 40)
    as_pillow = Resample(rows, columns, "lanczos", CPU)(image)
    orders = [Resample(rows, columns, "lanczos", CPU, order)(image) for order in (axes, axes[::-1])]
    assert not torch.equal(*orders) and sum(torch.equal(as_pillow, order) for order in orders) == 1


def test_other_images_than_announced_are_refused():
    config = Config(image_size=16, resize="box", crop_area=1.0)
    pixels = Pixels(config, [(32, 32), (20, 30)], CPU)
    with pytest.raises(ValueError, match="1 images for 2 cameras"):
        pixels([photos(32, 32)])
    with pytest.raises(ValueError, match=r"images\[1\] is torch.uint8 \(3, 30, 20, 3\), expected torch.uint8 \(3, 20, 30, 3\)"):
        pixels([photos(32, 32), photos(30, 20)])
    with pytest.raises(ValueError, match=r"images\[0\] is torch.float32"):
        pixels([photos(32, 32).float(), photos(20, 30)])
    with pytest.raises(ValueError, match=r"crop area must be in \(0, 1\], got 1.5"):
        Pixels(Config(image_size=16, resize="box", crop_area=1.5), [(32, 32)], CPU)
    with pytest.raises(ValueError, match="at least one camera"):
        Pixels(config, [], CPU)
