"""Small data in the layouts of the public data sets."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from swav_testing.shards import Members, write_tar

WORDNET_IDS = ("n01440764", "n01443537", "n02119789")
# As in the real kit, the numbers follow another order than the WordNet ids; 1001 is no class but a group of them.
DEVKIT_IDS = (("n02119789", 1, 0), ("n01440764", 2, 0), ("n01443537", 3, 0), ("n00001740", 1001, 3))
TRUTH = (3, 1, 1, 2, 3, 2)  # of the validation images 1 to 6


def write_files(folder: Path, members: Members) -> Path:
    """Files below a folder."""
    for name, data in members:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(members: Members) -> bytes:
    """A tar in memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def train_images() -> dict[str, bytes]:
    """By path; the archives list neither classes nor images in sorted order."""
    return {
        f"{wordnet_id}/{wordnet_id}_{number}.JPEG": f"{wordnet_id}-{number}".encode()
        for wordnet_id in reversed(WORDNET_IDS)
        for number in (10026, 10027, 9)
    }


def val_images() -> dict[str, bytes]:
    """By path, with the class's folder that the development kit gives."""
    classes = {number: wordnet_id for wordnet_id, number, _ in DEVKIT_IDS}
    return {
        f"{classes[truth]}/ILSVRC2012_val_{number:08d}.JPEG": b"val-%d" % number
        for number, truth in enumerate(TRUTH, 1)
    }


def imagenet_folders(folder: Path) -> Path:
    """Folders of classes."""
    write_files(folder / "train", train_images().items())
    return write_files(folder / "val", val_images().items()).parent


def meta_mat(ids: tuple[tuple[str, int, int], ...] = DEVKIT_IDS) -> bytes:
    """The development kit's table of classes: WordNet id, ILSVRC2012_ID, number of children."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    synsets = np.zeros((len(ids), 1), dtype=[(field, "O") for field in fields])
    for row, (wordnet_id, number, num_children) in enumerate(ids):
        synsets[row, 0] = (number, wordnet_id, "kit fox", "a fox", num_children, np.array([[1]]), 0)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": synsets})
    return file.getvalue()


def devkit(ids: tuple[tuple[str, int, int], ...] = DEVKIT_IDS, truth: tuple[int, ...] = TRUTH) -> dict[str, bytes]:
    """The development kit's files that labels come from."""
    root = "ILSVRC2012_devkit_t12/data"
    return {
        f"{root}/meta.mat": meta_mat(ids),
        f"{root}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }


def imagenet_archives(folder: Path) -> Path:
    """The archives as they are published."""
    images = train_images()
    classes = [
        (f"{one}.tar", tar_bytes((n.rpartition("/")[2], d) for n, d in images.items() if n.startswith(one)))
        for one in reversed(WORDNET_IDS)
    ]
    write_tar(folder / "ILSVRC2012_img_train.tar", classes)
    flat = sorted((name.rpartition("/")[2], data) for name, data in val_images().items())
    write_tar(folder / "ILSVRC2012_img_val.tar", reversed(flat))
    return write_devkit(folder, devkit())


def write_devkit(folder: Path, files: dict[str, bytes]) -> Path:
    """The development kit's archive."""
    return write_files(folder, [("ILSVRC2012_devkit_t12.tar.gz", gzip.compress(tar_bytes(files.items())))])


def voc_annotation(*objects: tuple[str, int]) -> bytes:
    """An annotation of objects: their class, and 1 for a difficult one."""
    body = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>"
        f"<part><name>head</name></part></object>"
        for name, difficult in objects
    )
    return f"<annotation><folder>VOC2007</folder><filename>x.jpg</filename>{body}</annotation>".encode()


VOC_SAMPLES = {
    "000005": (("chair", 0), ("chair", 1), ("person", 1)),
    "000007": (("car", 0),),
    "000012": (),
    "000019": (("dog", 0), ("cat", 0), ("dog", 0)),
}


def voc_files(root: str = "VOCdevkit/VOC2007") -> dict[str, bytes]:
    """Pascal VOC: two images to train on, one to validate, one to test."""
    lists = {"train": ("000007", "000005"), "val": ("000012",), "test": ("000019",)}
    lists["trainval"] = ("000005", "000007", "000012")
    files = {f"{root}/ImageSets/Main/{name}.txt": "\n".join([*names, ""]).encode() for name, names in lists.items()}
    files[f"{root}/ImageSets/Main/dog_train.txt"] = b"000005 -1\n000007 -1\n"
    for name, objects in VOC_SAMPLES.items():
        files[f"{root}/Annotations/{name}.xml"] = voc_annotation(*objects)
        files[f"{root}/JPEGImages/{name}.jpg"] = f"image {name}".encode()
    return files
