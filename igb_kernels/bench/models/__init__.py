"""Models that people train on several tasks: their sizes, with random weights and random input."""

from __future__ import annotations

from igb_kernels.bench.models import qm9
from igb_kernels.bench.models.base import (
    Load,
    Model,
    MultiTask,
    Unavailable,
    matrix_flops_per_second,
    squared_error,
)
from igb_kernels.bench.models.language import bert
from igb_kernels.bench.models.recommenders import mmoe, ple
from igb_kernels.bench.models.small import cnn, mlp
from igb_kernels.bench.models.vision import resnet, segnet_mtan, vit

__all__ = [
    "ALL",
    "LONGEST",
    "LONGEST_NAMED",
    "MODELS",
    "SMALL",
    "Load",
    "Model",
    "MultiTask",
    "Unavailable",
    "matrix_flops_per_second",
    "squared_error",
]

ALL = "all"
"""In the place of names."""
LONGEST = 2.0
"""Seconds that the passes of a step may take, for models that were not asked for by name."""
LONGEST_NAMED = 60.0
SMALL = ("mlp-33k", "mlp-5.8m", "cnn-4.7m")
"""Those with short steps, the same on all devices."""

_VIT_L = {"width": 1024, "layers": 24, "attention_heads": 16}
_CLICKS = {"batch": 512}, {"batch": 8192}

MODELS = {
    model.name: model
    for model in (
        Model("mlp-33k", "a small regression network: overheads show", mlp, {"batch": 128}, {"batch": 128}),
        Model(
            "mlp-5.8m",
            "a wide regression network: passes are short for their gradients",
            mlp,
            {"batch": 64},
            {"batch": 64},
            {"widths": (784, 2048, 2048)},
        ),
        Model("cnn-4.7m", "a convolutional network on CIFAR's images", cnn, {"batch": 16}, {"batch": 16}),
        Model(
            "resnet-50",
            "attributes of images, as CelebA's",
            resnet,
            {"batch": 4, "image": 112},
            {"batch": 32, "image": 224},
        ),
        Model("vit-b", "ViT-B/16, classifications of an image", vit, {"batch": 1}, {"batch": 16}),
        Model("vit-l", "ViT-L/16, classifications of an image", vit, {"batch": 1}, {"batch": 8}, _VIT_L),
        Model(
            "segnet-mtan",
            "dense prediction as on NYUv2: segmentation, depth, normals",
            segnet_mtan,
            {"batch": 1, "image": (64, 96)},
            {"batch": 4, "image": (288, 384)},
        ),
        Model(
            "bert-base",
            "classifications of a text, as GLUE's",
            bert,
            {"batch": 2, "tokens": 32},
            {"batch": 16, "tokens": 128},
        ),
        Model("mmoe", "a recommender: 26 fields of 100,000 rows, experts with gates", mmoe, *_CLICKS),
        Model("mmoe-sparse", "the same with sparse gradients of its tables", mmoe, *_CLICKS, {"sparse": True}),
        Model("ple", "a recommender with experts of its own for each task, in two levels", ple, *_CLICKS),
        Model("ple-sparse", "the same with sparse gradients of its tables", ple, *_CLICKS, {"sparse": True}),
        Model(
            "qm9-schnet",
            "properties of 120 molecules of QM9, by the network of examples/qm9",
            qm9.qm9_schnet,
            {"batch": qm9.MOLECULES},
            {"batch": qm9.MOLECULES},
            missing=qm9.missing,
            on_meta=False,
        ),
    )
}
