"""Images in folders, one folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_peft.data.examples import Example
from lightning_peft.data.rows_module import TRAIN, RowsDataModule
from lightning_peft.errors import BadRowError, ConfigError
from lightning_peft.source_rows.bad_rows import BadRows
from lightning_peft.source_rows.reading import Row

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class ImageFolderDataModule(RowsDataModule):
    """Images to classify: ``train/cat/1.png`` is a cat.

    Batches are ``{"pixel_values": (batch, 3, height, width), "labels": (batch,)}``. Images are opened once at the start, so that one that is
    none is told with its file, and read when a batch needs them. Rows are numbered in the order of the paths; files and folders whose
    names begin with a dot are passed over. Images are turned the way up that their camera says.

    Args:
        train: folder with a folder for each class.
        val: folder to evaluate on, or several by name, with the same classes.
        image_processor: folder or hub id of the model, whose image processor makes the pixels; if None they are made as the next
            arguments say.
        image_size: height and width of the images.
        mean: what is taken from red, green and blue, which are from 0 to 1.
        std: what they are divided by then.
        options: arguments of :class:`RowsDataModule`.
    """

    label_names: list[str]
    """Names of the classes, in the order of their numbers; empty before ``setup``."""

    def __init__(
        self,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        *,
        image_processor: str | None = None,
        image_size: int = 224,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(train, val, **options)
        self.check_whole(1, image_size=image_size)
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ConfigError(
                f"ImageFolderDataModule needs three numbers as mean={mean!r} and as std={std!r}, and those positive"
            )
        for name in ("max_similarity", "diverse_rows", "group_by_length", "streaming", "load_options"):
            if getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r} is for text; leave it out for images")
        self.image_processor, self.image_size, self.mean, self.std = (
            image_processor,
            image_size,
            tuple(mean),
            tuple(std),
        )
        self.label_names: list[str] = []
        self._processor: Any = None

    @property
    def num_labels(self) -> int:
        """How many classes there are; known after ``setup``."""
        return len(self.label_names)

    @override
    def prepare(self) -> None:
        if not self.label_names:
            self.label_names = sorted({folder.name for source in self._train.values() for folder in _folders(source)})
        if self.image_processor is not None and self._processor is None:
            self._processor = _load_processor(self.image_processor)

    @override
    def read(self, name: str, source: str, bad_rows: BadRows, *, split: str = TRAIN) -> Iterator[Row]:
        """Yield the images of a folder, as rows with a file and a label."""
        number = 0
        for folder in _folders(source):
            for file in _images(folder):
                number += 1
                yield Row({"file": str(file), "label": folder.name}, str(file), number)

    @override
    def example(self, row: Row, bad_rows: BadRows) -> Example:
        """Return the file of an image and its class.

        Raises:
            BadRowError: it is no image, or of a class that training does not have.
        """
        if row.values["label"] not in self.label_names:
            raise BadRowError(
                "malformed",
                repr(row.source),
                f"is of the class {row.values['label']!r}; train has {', '.join(self.label_names)}",
            )
        try:
            with _pillow().open(row.source) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            kind = "malformed" if Path(row.source).stat().st_size else "empty"
            raise BadRowError(kind, repr(row.source), f"is no image that can be read: {error}") from error
        return {"file": row.source, "labels": self.label_names.index(row.values["label"])}

    @override
    def collator(self) -> Callable[[list[Example]], dict[str, Any]]:
        return ImageCollator(self._processor, self.image_size, self.mean, self.std)

    @override
    def shown(self, example: Example) -> list[tuple[str, bool]]:
        """Return the file with the size of the image, and its class as what is predicted."""
        with _pillow().open(example["file"]) as image:
            size = f"{image.width} x {image.height} {image.mode}"
        return [(f"{example['file']} ({size}) → ", False), (self.label_names[example["labels"]], True)]


@dataclass(frozen=True)
class ImageCollator:
    """Batches of images that are read from their files."""

    processor: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return ``pixel_values`` (batch, 3, height, width) and ``labels`` (batch,)."""
        images = [_read(example["file"]) for example in examples]
        if self.processor is not None:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.stack([self.pixels(image) for image in images])
        return {"pixel_values": pixels, "labels": torch.tensor([example["labels"] for example in examples])}

    def pixels(self, image: Any) -> Tensor:
        """Return an image as (3, size, size), scaled and normalised."""
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        values = raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255  # (3, height, width)
        values = F.interpolate(values[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        mean, std = (torch.tensor(three)[:, None, None] for three in (self.mean, self.std))
        return (values - mean) / std


def _read(file: str) -> Any:
    try:
        with _pillow().open(file) as image:
            return _as_seen(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{file!r} ends before the image does, or was changed: {error}; take it out of the folder"
        ) from error


def _as_seen(image: Any) -> Any:
    """Return an image in RGB, the way up that its camera says; grey in 16 bits is scaled, which Pillow would cut off at 255."""
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        turned = turned.point(lambda value: value / 256).convert("L")
    return turned.convert("RGB")


def _folders(source: str) -> list[Path]:
    inside = Path(source).iterdir() if Path(source).is_dir() else ()
    folders = sorted(folder for folder in inside if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise ConfigError(
            f"{source!r} has no folders; it must have one for each class, with images in it. Relative paths start at {str(Path.cwd())!r}"
        )
    return folders


def _images(folder: Path) -> list[Path]:
    inside = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _load_processor(path: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"no image processor can be loaded from {path!r}: {error}") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images are read with the library pillow, which is not installed: pip install 'lightning-peft[data]'"
        ) from error
    return Image
