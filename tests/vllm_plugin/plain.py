"""A vqserve checkpoint as an ordinary one: every code replaced by the weight it stands for, in fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

from random_checkpoint import COPIED
from random_parent import write_json, write_weights
from vqserve.format.files import check_checkpoint, read_config
from vqserve.model.weights import DequantizedModel


def write_plain(checkpoint: Path, folder: Path) -> Path:
    """Writes the weights of `checkpoint`, experts and spine dequantized to fp32, under the parent's names."""
    config = {k: v for k, v in read_config(checkpoint).items() if k != "quantization_config"}
    model = DequantizedModel(check_checkpoint(checkpoint))
    tensors = {name: model.tensor(name).float() for name in model.names}
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(checkpoint / name, folder / name)
    write_json(folder / "config.json", config)
    write_weights(folder, tensors, 1)
    return folder
