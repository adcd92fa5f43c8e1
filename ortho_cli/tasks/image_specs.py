"""The picture sets a recipe can name: their sizes, their place on the hub, how a local copy looks and how to get one.

Means and standard deviations are those of the training pictures, values in [0, 1]; for `imagenet` and folders the pair
that published ImageNet weights expect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ortho_cli.errors import RecipeError

__all__ = ["SPECS", "Hub", "ImageSpec", "Split", "missing_data", "sources"]

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Hub:
    """A set on the Hugging Face hub; `label` is None where pictures have no classes."""

    id: str
    config: str | None
    image: str
    label: str | None
    splits: Mapping[Split, str]


@dataclass(frozen=True)
class ImageSpec:
    """What is known about a set without opening it.

    `num_classes` None: counted when the set is opened; 1: nobody sorted the pictures. `sized`: whether all pictures
    have `size` pixels already, or are squeezed to it; of others the middle square is cut out as they are opened,
    `share` of their shorter side. `tree` and `fetch` are lines of text, `FOLDER` standing for `data.path`.
    """

    name: str
    title: str
    num_classes: int | None
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sized: bool = True
    share: float = 0.875  # 224 of 256 pixels, as ImageNet models have always been evaluated
    hub: Hub | None = None
    tree: tuple[str, ...] = ()
    fetch: tuple[str, ...] = field(default=())

    @property
    def has_classes(self) -> bool:
        """Whether the pictures are sorted."""
        return self.num_classes != 1


def missing_data(spec: ImageSpec, message: str, where: str | None = None) -> RecipeError:
    """The error for data that is not there: how a copy looks, and how to get one."""
    hint = "\n  ".join(["expected:", *spec.tree, "get it:", *sources(spec)])
    return RecipeError(message, hint=hint, where=where)


def sources(spec: ImageSpec) -> tuple[str, ...]:
    """Where a set can be had, in lines of text."""
    if spec.hub is None:
        return spec.fetch
    return (f"leave out data.path: the hub's {spec.hub.id} is fetched (pip install 'ortho-cli[vision]')", *spec.fetch)


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_TRAIN: Mapping[Split, str] = {"train": "train"}  # of hub sets that hold no part to evaluate on
_HALF = (0.5, 0.5, 0.5)  # of sets whose statistics no published model expects: [0, 1] to [-1, 1]
_SPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"

SPECS: dict[str, ImageSpec] = {
    spec.name: spec
    for spec in (
        ImageSpec(
            "digits", "8x8 grey digits of scikit-learn, 10 classes, 1,438 to train and 359 to evaluate",
            10, 1, 8, (0.3053,), (0.3760,),
            fetch=("nothing to fetch: it comes with scikit-learn",),
        ),
        ImageSpec(
            "mnist", "28x28 grey digits, 10 classes, 60,000 to train and 10,000 to evaluate",
            10, 1, 28, (0.1307,), (0.3081,),
            hub=Hub("ylecun/mnist", "mnist", "image", "label", {"train": "train", "eval": "test"}),
            tree=(
                "FOLDER/train-images-idx3-ubyte[.gz]",
                "FOLDER/train-labels-idx1-ubyte[.gz]",
                "FOLDER/t10k-images-idx3-ubyte[.gz]",
                "FOLDER/t10k-labels-idx1-ubyte[.gz]",
            ),
            fetch=("the four files of https://huggingface.co/datasets/ylecun/mnist or of any MNIST mirror, 12 MB",),
        ),
        ImageSpec(
            "cifar10", "32x32 colour pictures, 10 classes, 50,000 to train and 10,000 to evaluate",
            10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010),
            hub=Hub("uoft-cs/cifar10", "plain_text", "img", "label", {"train": "train", "eval": "test"}),
            tree=(
                "FOLDER/cifar-10-batches-py/data_batch_1 ... data_batch_5, test_batch",
                "or FOLDER/cifar-10-batches-bin/data_batch_1.bin ... data_batch_5.bin, test_batch.bin",
            ),
            fetch=(f"curl -O {_TORONTO}/cifar-10-python.tar.gz && tar xf cifar-10-python.tar.gz -C FOLDER",),
        ),
        ImageSpec(
            "cifar100", "32x32 colour pictures, 100 classes, 50,000 to train and 10,000 to evaluate",
            100, 3, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761),
            hub=Hub("uoft-cs/cifar100", "cifar100", "img", "fine_label", {"train": "train", "eval": "test"}),
            tree=("FOLDER/cifar-100-python/train, test", "or FOLDER/cifar-100-binary/train.bin, test.bin"),
            fetch=(f"curl -O {_TORONTO}/cifar-100-python.tar.gz && tar xf cifar-100-python.tar.gz -C FOLDER",),
        ),
        ImageSpec(
            "tiny-imagenet", "64x64 colour pictures, 200 classes, 100,000 to train and 10,000 to evaluate",
            200, 3, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821),
            hub=Hub("zh-plus/tiny-imagenet", None, "image", "label", {"train": "train", "eval": "valid"}),
            tree=(
                "FOLDER/tiny-imagenet-200/train/<wnid>/images/*.JPEG",
                "FOLDER/tiny-imagenet-200/val/images/*.JPEG and val/val_annotations.txt",
            ),
            fetch=(
                "curl -O http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "unzip -q tiny-imagenet-200.zip -d FOLDER",
            ),
        ),
        ImageSpec(
            "imagenet", "colour pictures of any size, 1,000 classes, 1,281,167 to train and 50,000 to evaluate",
            1000, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD, sized=False,
            hub=Hub("ILSVRC/imagenet-1k", None, "image", "label", {"train": "train", "eval": "validation"}),
            tree=("FOLDER/train/<wnid>/*.JPEG", "FOLDER/val/<wnid>/*.JPEG"),
            fetch=(
                "accept the terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k, then: hf auth login",
                "(155 GB; a subset of the classes is read with name: image-folder)",
            ),
        ),
        ImageSpec(
            "faces", "25x25 grey faces of scikit-image, without classes, 80 to train and 20 to evaluate",
            1, 1, 25, (0.4542,), (0.2134,),
            fetch=("nothing to fetch: it comes with scikit-image (pip install scikit-image)",),
        ),
        ImageSpec(
            "dsprites", "64x64 sprites, black and white, without classes, 737,280 of which one in five to evaluate",
            1, 1, 64, (0.5,), (0.5,),
            hub=Hub("eurecom-ds/dsprites", None, "image", None, _TRAIN),
            tree=(f"FOLDER/{_SPRITES}",),
            fetch=(f"curl -LO https://github.com/google-deepmind/dsprites-dataset/raw/master/{_SPRITES}",),
        ),
        ImageSpec(
            "celeba", "178x218 faces of celebrities, without classes, 162,770 to train and 19,867 to evaluate",
            1, 3, 128, _HALF, _HALF, sized=False, share=170 / 178,
            hub=Hub(
                "flwrlabs/celeba", "img_align+identity+attr", "image", None, {"train": "train", "eval": "valid"}
            ),
            tree=(
                "FOLDER/img_align_celeba/000001.jpg ... 202599.jpg",
                "FOLDER/list_eval_partition.txt; without it one picture in five is for evaluation",
            ),
            fetch=("the aligned pictures of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (not for commerce)",),
        ),
        ImageSpec(
            "lsun-church", "churches of any size, without classes, 126,227 to train and 300 to evaluate",
            1, 3, 128, _HALF, _HALF,
            hub=Hub("tglcourse/lsun_church_train", None, "image", None, {"train": "train", "eval": "test"}),
            tree=("FOLDER/church_outdoor_train_lmdb/data.mdb", "FOLDER/church_outdoor_val_lmdb/data.mdb"),
            fetch=(
                "church_outdoor_train_lmdb.zip and church_outdoor_val_lmdb.zip of http://dl.yf.io/lsun/scenes",
                "(read by lmdb: pip install lmdb; the hub's copy parts the same pictures otherwise)",
            ),
        ),
        ImageSpec(
            "ffhq", "70,000 faces of Flickr, without classes, one in five to evaluate",
            1, 3, 256, _HALF, _HALF, sized=False, share=1.0,
            hub=Hub("merkol/ffhq-256", None, "image", None, _TRAIN),
            tree=("FOLDER/00000/00000.png ... 69000/69999.png", "or the pictures in one folder"),
            fetch=("https://github.com/NVlabs/ffhq-dataset (not for commerce)",),
        ),
        ImageSpec(
            "anime-faces", "63,565 drawn faces, without classes, one in five to evaluate",
            1, 3, 128, _HALF, _HALF, sized=False, share=1.0,
            hub=Hub("DrishtiSharma/Anime-Face-Dataset", None, "image", None, _TRAIN),
            tree=("FOLDER/*.jpg, or in folders below",),
            fetch=("or any folder of drawn faces",),
        ),
        ImageSpec(
            "image-folder", "your own pictures of any size, one folder a class or a metadata.jsonl",
            None, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD, sized=False,
            tree=(
                "FOLDER/train/<class>/* and FOLDER/val/<class>/*   (val, valid, validation, test or eval)",
                "or FOLDER/<class>/*: every fifth picture of a class, drawn once for all, is for evaluation",
                'or, in place of the class folders, a metadata.jsonl of {"file_name": "a.png", "label": "cat"}',
                "or, where classes do not matter (task gan), FOLDER/* or FOLDER/train/* and FOLDER/val/*",
            ),
            fetch=("or name a set of the hub: source: ORG/NAME[@revision]",),
        ),
    )
}  # fmt: skip
