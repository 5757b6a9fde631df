"""Images in folders of classes."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import ImageFolderDataModule
from lightning_peft.errors import BadRowError, ConfigError

Image = pytest.importorskip("PIL.Image", reason="needs pillow")


@pytest.fixture
def folder(tmp_path):
    """Four red and three blue images of several sizes and kinds."""
    for name, colour, count in (("blue", (0, 0, 255), 3), ("red", (255, 0, 0), 4)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(count):
            suffix = ("png", "jpg", "bmp", "webp")[number]
            Image.new("RGB", (6 + number, 9), colour).save(tmp_path / "train" / name / f"{number}.{suffix}")
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    return tmp_path / "train"


def set_up(*args, **options):
    data = ImageFolderDataModule(*args, **{"shuffle": False, "image_size": 8, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def test_images_are_scaled_normalised_and_labelled_by_folder(folder):
    data = set_up(str(folder), batch_size=7, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 0.5))
    (batch,) = data.train_dataloader()
    assert data.label_names == ["blue", "red"]
    assert batch["labels"].tolist() == [0] * 3 + [1] * 4
    assert batch["pixel_values"].shape == (7, 3, 8, 8)
    for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        wanted = [(-1.0, 0.0, 2.0), (1.0, 0.0, 0.0)][label]  # (value - mean) / std
        torch.testing.assert_close(image.mean((1, 2)), torch.tensor(wanted), atol=0.03, rtol=0)
    assert data.shown(data.first("train", 1)[0]) == [
        (f"{folder}/blue/0.png (6 x 9 RGB) → ", False),
        ("blue", True),
    ]


def test_pixels_keep_their_places(tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("L", (2, 3))
    image.putdata([0, 51, 102, 153, 204, 255])
    image.resize((2, 3)).save(tmp_path / "a" / "1.png")
    data = set_up(str(tmp_path), image_size=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    (pixels,) = (batch["pixel_values"] for batch in data.train_dataloader())
    torch.testing.assert_close(pixels.flatten(), torch.full((3,), 0.5), atol=0.01, rtol=0)
    collator = data.collator()
    wide = type(collator)(None, 6, (0.0,) * 3, (1.0,) * 3).pixels(Image.open(tmp_path / "a" / "1.png").convert("RGB"))
    assert wide[0, 0, 0] < wide[0, 0, 5] < wide[0, 5, 5]
    assert wide[0, 0, 5] < wide[0, 5, 0]


def test_an_image_processor_makes_the_pixels_where_one_is_given(folder, tmp_path):
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 5, "width": 4}, image_mean=[0] * 3, image_std=[1] * 3).save_pretrained(
        tmp_path / "model"
    )
    data = set_up(str(folder), image_processor=str(tmp_path / "model"))
    (batch,) = data.train_dataloader()
    assert batch["pixel_values"].shape == (7, 3, 5, 4)
    torch.testing.assert_close(batch["pixel_values"][0, 2].mean(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_images_that_cannot_be_read_are_told_with_their_file(folder):
    (folder / "red" / "5.png").write_bytes(b"")
    whole = (folder / "blue" / "0.png").read_bytes()
    (folder / "red" / "6.png").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "7.jpg").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"1 empty row left out: '.*5.png' is no image.*\n2 malformed rows"):
        data = set_up(str(folder), on_bad_rows="report")
    assert sum(map(len, data._datasets.values())) == 7
    with pytest.raises(BadRowError, match=r"red/5.png' is no image that can be read"):
        set_up(str(folder))


def test_an_image_that_changes_after_the_start_is_an_error(folder):
    data = set_up(str(folder))
    (folder / "red" / "1.jpg").write_bytes((folder / "red" / "1.jpg").read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"1.jpg' ends before the image does"):
        list(data.train_dataloader())


def test_folders_and_arguments_are_checked(folder, tmp_path):
    with pytest.raises(ConfigError, match="'nowhere' has no folders; it must have one for each class"):
        set_up("nowhere")
    other = tmp_path / "valid" / "green"
    other.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(other / "1.png")
    with pytest.raises(BadRowError, match="1.png' is of the class 'green'; train has blue, red"):
        set_up(str(folder), str(tmp_path / "valid"))
    with pytest.raises(ConfigError, match="no image processor can be loaded from"):
        set_up(str(folder), image_processor=str(tmp_path))
    for options, message in (
        ({"std": (1.0, 0.0, 1.0)}, "and those positive"),
        ({"streaming": True}, "streaming=True is for text; leave it out for images"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageFolderDataModule(str(folder), **options)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_images_resume_with_workers(folder):
    data = set_up(str(folder), batch_size=2, shuffle=True)
    expected = [batch["pixel_values"] for batch in data.train_dataloader()]
    data.num_workers = 2
    loader = data.train_dataloader()
    next(iter(loader))
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = [batch["pixel_values"] for batch in again]
    assert len(rest) == 3
    assert all(torch.equal(one, other) for one, other in zip(rest, expected[1:], strict=True))


def test_what_is_hidden_is_no_class_and_no_image(folder):
    for path in (folder / ".ipynb_checkpoints", folder / "red" / ".cache"):
        path.mkdir()
        Image.new("RGB", (4, 4)).save(path / "1.png")
    (folder / "blue" / "._0.png").write_bytes(b"as a disk of another system leaves it")
    data = set_up(str(folder))
    assert data.label_names == ["blue", "red"]
    assert len(data._datasets["train", True]) == 7


def test_pixels_are_what_a_viewer_shows(tmp_path):
    (tmp_path / "a").mkdir()
    Image.frombytes("I;16", (1, 2), (65535).to_bytes(2, "little") + (32768).to_bytes(2, "little")).save(
        tmp_path / "a" / "1.png"
    )
    photo = Image.new("RGB", (2, 1))
    photo.putdata([(255, 0, 0), (0, 0, 255)])
    turned = photo.getexif()
    turned[0x0112] = 6  # to be turned a quarter clockwise: what is on the left is on top
    photo.save(tmp_path / "a" / "2.png", exif=turned)
    data = set_up(str(tmp_path), image_size=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    (pixels,) = (batch["pixel_values"] for batch in data.train_dataloader())
    torch.testing.assert_close(pixels[0, 0, :, 0], torch.tensor([1.0, 0.5]), atol=0.01, rtol=0)
    torch.testing.assert_close(pixels[1, 0], torch.tensor([[1.0, 1.0], [0.0, 0.0]]), atol=0.01, rtol=0)
