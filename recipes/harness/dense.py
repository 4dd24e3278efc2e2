"""Dense prediction from a folder of .npy files, in the layout of MTAN's preprocessed NYUv2 and Cityscapes:
`<root>/{train,val}/<field>/<i>.npy`, each HWC (labels HW), floats of either width; with its augmentation and losses.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gradsurgery.recipes.harness.benchmark import RecipeError, Sample
from gradsurgery.recipes.harness.metrics import valid_pixels

CHANNELS = {"image": 3, "label": 0, "depth": 1, "normal": 3}
"""field -> channels; 0 for a map without a channel axis"""

TASKS = {"segmentation": "label", "depth": "depth", "normal": "normal"}
"""task -> field"""


class DenseFolder(Dataset[Sample]):
    """(image (3, H, W) float32, {task: target}): labels (H, W) int64, the others (C, H, W) float32.

    Args:
        root: the data folder, which holds `train` and `val`.
        split: one of those.
        tasks: task -> field.
        classes: labels are -1 (ignored) to `classes` - 1.

    Raises:
        RecipeError: a folder or file is missing, damaged or of another shape; it names the file and what was expected.
    """

    def __init__(self, root: Path, split: str, tasks: Mapping[str, str], classes: int) -> None:
        self.folder, self.tasks, self.classes = root / split, dict(tasks), classes
        fields = ["image", *self.tasks.values()]
        for folder in (root, self.folder, *(self.folder / field for field in fields)):
            if not folder.is_dir():
                raise RecipeError(
                    f"The data folder {folder} is missing: expected {root}/{{train,val}}/{{{','.join(fields)}}}/"
                    f"0.npy, 1.npy, ..."
                )
        self.count = sum(1 for _ in (self.folder / "image").glob("*.npy"))
        if not self.count:
            raise RecipeError(f"The data folder {self.folder / 'image'} has no .npy file: expected 0.npy, 1.npy, ...")
        self.size: tuple[int, int] | None = None
        height, width, _ = self._open("image", 0).shape
        self.size = (height, width)
        for field in fields:
            self._check_field(field)

    def _check_field(self, field: str) -> None:
        found = sum(1 for _ in (self.folder / field).glob("*.npy"))
        if found > self.count:
            raise RecipeError(
                f"{self.folder / field} has {found} .npy files, {self.folder / 'image'} has {self.count}: expected one "
                f"file an image in each."
            )
        for index in range(self.count):
            self._open(field, index)

    def _open(self, field: str, index: int) -> np.ndarray:
        """The array as it lies on the disk, its header checked and its values not yet read."""
        path = self.folder / field / f"{index}.npy"
        last = (CHANNELS[field],) if CHANNELS[field] else ()
        shape = ", ".join(str(n) for n in (*(self.size or ("height", "width")), *last))
        expected = f"expected a float32 or float64 array of shape ({shape})"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise RecipeError(
                f"{path} is missing: {expected}, one for each of the {self.count} images 0.npy to {self.count - 1}.npy."
            ) from error
        except (ValueError, OSError, EOFError) as error:
            raise RecipeError(f"{path} is damaged ({error}): {expected}.") from error
        fits = array.ndim == 2 + len(last) and array.shape[2:] == last and self.size in (None, array.shape[:2])
        if not fits or array.dtype not in (np.float32, np.float64):
            raise RecipeError(f"{path} is {array.dtype} of shape {array.shape}: {expected}.")
        return array

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self._read("image", index), {task: self._read(field, index) for task, field in self.tasks.items()}

    def _read(self, field: str, index: int) -> Tensor:
        tensor = torch.from_numpy(np.array(self._open(field, index), dtype=np.float32))
        if CHANNELS[field]:
            return tensor.permute(2, 0, 1).contiguous()
        labels = tensor.long()
        if labels.min() < -1 or labels.max() >= self.classes:
            raise RecipeError(
                f"{self.folder / field / f'{index}.npy'} has labels {int(labels.min())} to {int(labels.max())}: "
                f"expected -1 (ignored) to {self.classes - 1}."
            )
        return labels


def scale_crop_flip(sample: Sample, generator: np.random.Generator) -> Sample:
    """MTAN's augmentation: a crop of 1, 1/1.2 or 1/1.5 of the size, brought back to full size, and a mirror image.

    Nearer objects look larger: the depth is divided by the scale. Normals are resampled and not normalised again;
    the mirror negates their x.
    """
    image, targets = sample
    scale = (1.0, 1.2, 1.5)[int(generator.integers(3))]
    height, width = image.shape[-2:]
    h, w = int(height / scale), int(width / scale)
    top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
    flip = bool(generator.random() < 0.5)

    def crop(x: Tensor, smooth: bool) -> Tensor:
        part = x[None, :, top : top + h, left : left + w]
        if smooth:
            out = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=True)
        else:
            out = F.interpolate(part, size=(height, width), mode="nearest")
        return out[0].flip(-1) if flip else out[0]

    mirror = torch.tensor([-1.0 if flip else 1.0, 1.0, 1.0])[:, None, None]
    rules = {
        "segmentation": lambda x: crop(x[None].float(), smooth=False)[0].long(),
        "depth": lambda x: crop(x, smooth=False) / scale,
        "normal": lambda x: crop(x, smooth=True) * mirror,
    }
    return crop(image, smooth=True), {task: rules[task](target) for task, target in targets.items()}


def segmentation_loss(logits_BCHW: Tensor, label_BHW: Tensor) -> Tensor:
    """Cross-entropy over the pixels whose label is not -1; 0 if there is none."""
    total = F.cross_entropy(logits_BCHW, label_BHW, ignore_index=-1, reduction="sum")
    return total / (label_BHW != -1).sum().clamp(min=1)


def depth_loss(prediction_B1HW: Tensor, target_B1HW: Tensor) -> Tensor:
    """Mean absolute error over the valid pixels; 0 if there is none."""
    mask = valid_pixels(target_B1HW).unsqueeze(1)
    return ((prediction_B1HW - target_B1HW).abs() * mask).sum() / mask.sum().clamp(min=1)


def normal_loss(prediction_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """1 - mean cosine between the normalised prediction and the target, over the valid pixels; 0 if there is none."""
    mask = valid_pixels(target_B3HW).unsqueeze(1)
    total = (F.normalize(prediction_B3HW, dim=1) * target_B3HW * mask).sum()
    return torch.where(mask.any(), 1 - total / mask.sum().clamp(min=1), 0 * total)
