"""Labelled images from wherever a team keeps them, as plain arrays.

Knows the kinds of source that ``data.source`` may name. Does not know what the images are
used for. Nothing is ever downloaded.
"""

from lifelong_ray.datasets.cleaning import clean_images, clean_labels, one_label_each
from lifelong_ray.datasets.files import image_file
from lifelong_ray.datasets.items import from_torch_dataset, returned_by
from lifelong_ray.datasets.labelled import (
    DataSource,
    ImageArrays,
    LabelledImages,
    SourceArrays,
    as_arrays,
    as_source_arrays,
    natural_order,
)
from lifelong_ray.datasets.load import comes_in_parts, continuum_function, load_parts, load_source
from lifelong_ray.datasets.parts import class_order, hold_out, thinned

__all__ = [
    "DataSource",
    "ImageArrays",
    "LabelledImages",
    "SourceArrays",
    "as_arrays",
    "as_source_arrays",
    "class_order",
    "clean_images",
    "clean_labels",
    "comes_in_parts",
    "continuum_function",
    "from_torch_dataset",
    "hold_out",
    "image_file",
    "load_parts",
    "load_source",
    "natural_order",
    "one_label_each",
    "returned_by",
    "thinned",
]
