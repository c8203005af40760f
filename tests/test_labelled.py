"""Labelled images: which class a file shows, by its folder or by a mapping, or one clear line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rexdeploy.errors import UsageError
from rexdeploy.images.labelled import LabelledImages, find_labelled, synsets

LABELS = ("tabby cat", "Dog", "cow")


def made(folder: Path, *files: str) -> Path:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("names", "read_as"),
    [
        (("cow", "Dog", "tabby cat"), "labels"),
        (("COW", "dog", "Tabby_Cat"), "labels"),
        (("2", "1", "0"), "indices"),
        (("002", "001", "000"), "indices"),
    ],
)
def test_a_folder_is_a_class(tmp_path: Path, names: tuple[str, ...], read_as: str) -> None:
    found = find_labelled(
        made(tmp_path, *(f"{name}/deep/{place}.png" for place, name in enumerate(names))), LABELS
    )
    assert found.read_as == read_as
    by_place = {Path(file).stem: int(c) for file, c in zip(found.files, found.classes, strict=True)}
    assert by_place == {"0": 2, "1": 1, "2": 0}


def test_labels_go_before_indices(tmp_path: Path) -> None:
    """Digits in another order than their names: the trap of taking folders by their place."""
    found = find_labelled(made(tmp_path, "0/a.png", "1/b.png"), ("1", "0"))
    assert (found.read_as, found.classes.tolist()) == ("labels", [1, 0])


def test_names_that_two_classes_have_are_none(tmp_path: Path) -> None:
    made(tmp_path, "crane/a.png")
    with pytest.raises(UsageError, match="1 of 1 classes are none of the network's: got 'crane'"):
        find_labelled(tmp_path, ("crane", "crane"))
    assert find_labelled(tmp_path, ("crane", "Crane")).classes.tolist() == [0]


def test_imagenet_is_known_by_its_synsets(tmp_path: Path) -> None:
    labels = tuple(f"class {index}" for index in range(1000))
    made(tmp_path, "n01440764/x.JPEG", "n15075141/y.JPEG")
    found = find_labelled(tmp_path, labels)
    assert (found.read_as, found.classes.tolist()) == ("synsets", [0, 999])
    assert len(set(synsets())) == 1000
    with pytest.raises(UsageError, match="got 'n01440764', 'n15075141'; expected 'a', 'b'"):
        find_labelled(tmp_path, ("a", "b"))


@pytest.mark.parametrize(
    "text",
    [
        "ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\n",  # caffe's val.txt
        "ILSVRC2012_val_00000001,n01443537\nILSVRC2012_val_00000002,n01440764",
        "n01443537\nn01440764\n",  # one line an image, by name
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4\n"
        "ILSVRC2012_val_00000001,n01443537 85 1 499 272 7 8 9 1\n",
        "\ufeffb/ILSVRC2012_val_00000001.JPEG\tclass 1\r\nb/ILSVRC2012_val_00000002.JPEG\tclass 0",
    ],
    ids=["val.txt", "csv", "a line an image", "Kaggle's", "tabs"],
)
def test_the_validation_set_with_its_list(tmp_path: Path, text: str) -> None:
    images = made(
        tmp_path / "val", "b/ILSVRC2012_val_00000001.JPEG", "b/ILSVRC2012_val_00000002.JPEG"
    )
    mapping = tmp_path / "list.txt"
    mapping.write_text(text)
    labels = tuple(f"class {index}" for index in range(1000))
    assert find_labelled(images, labels, mapping).classes.tolist() == [1, 0]


def test_a_mapping_of_folders(tmp_path: Path) -> None:
    made(tmp_path / "val", "katze/a.png", "hund/b.png")
    mapping = tmp_path / "names.csv"
    mapping.write_text("katze,tabby cat\nhund,dog\nkuh,cow\n")
    found = find_labelled(tmp_path / "val", LABELS, mapping)
    assert dict(zip(found.files, found.classes.tolist(), strict=True)) == {
        "hund/b.png": 1,
        "katze/a.png": 0,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a name and its class a line"),
        ("a.png dog\na.png cow\n", "'a.png' has two classes, 'cow' and 'dog'"),
        ("b.png dog\n", "no line is about a.png"),
        ("a.png horse\n", "1 of 1 classes are none of the network's: got 'horse'; expected"),
        ("a.png 3\n", "got '3'; expected 'tabby cat', 'Dog', 'cow' (names or indices 0 to 2)"),
        ("dog\ncow\n", "got 2 lines of one class each and 1 images"),
        ("490\n", "numbers without names could be of any order of classes"),
        ("a.png,dog,cow\n", "line 1 is 'a.png dog cow', expected a name and its class"),
        ('a.png,"dog', "no line is about|names and classes|none of"),
    ],
)
def test_a_mapping_that_says_nothing_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    made(tmp_path / "val", "a.png")
    mapping = tmp_path / "map.txt"
    mapping.write_text(text)
    if text == 'a.png,"dog':  # a quote that does not end is read to the end of the file
        assert find_labelled(tmp_path / "val", LABELS, mapping).classes.tolist() == [1]
        return
    with pytest.raises(UsageError) as refused:
        find_labelled(tmp_path / "val", LABELS, mapping)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"mapping {mapping}")


def test_what_cannot_be_a_mapping(tmp_path: Path) -> None:
    made(tmp_path / "val", "a.png")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for mapping, why in ((tmp_path / "binary", "not UTF-8"), (tmp_path, "cannot be read")):
        with pytest.raises(UsageError, match=why):
            find_labelled(tmp_path / "val", LABELS, mapping)


def test_an_image_beside_the_folders_is_named(tmp_path: Path) -> None:
    made(tmp_path, "dog/a.png", "stray.png")
    with pytest.raises(UsageError, match=r"stray.png is in no class's folder: expected .*CLASS"):
        find_labelled(tmp_path, LABELS)


def many(*counts: int) -> LabelledImages:
    classes = np.repeat(np.arange(len(counts)), counts)
    files = tuple(f"{label}/{index}.png" for index, label in enumerate(classes))
    return LabelledImages("val", files, classes, "labels")


def test_the_first_of_every_class_come_first() -> None:
    found = many(5, 1, 3).first(6)
    assert Counter(found.classes.tolist()) == {0: 3, 1: 1, 2: 2}
    assert found.files == ("0/0.png", "0/1.png", "0/2.png", "1/5.png", "2/6.png", "2/7.png")
    assert many(2, 1).first(10).files == many(2, 1).files


def test_a_sample_is_stratified_and_seeded() -> None:
    images = many(600, 300, 100)
    found = images.sampled(100, seed=3)
    counts = Counter(found.classes.tolist())
    assert all(abs(counts[label] - share) <= 1 for label, share in enumerate((60, 30, 10)))
    assert found.files == images.sampled(100, seed=3).files
    assert found.files != images.sampled(100, seed=4).files
    assert [int(file.split("/")[0]) for file in found.files] == found.classes.tolist()
    assert images.sampled(1000, seed=0) is images
