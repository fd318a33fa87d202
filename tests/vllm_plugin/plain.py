"""A vqserve checkpoint as an ordinary one: every code replaced by the weight it stands for, in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from random_checkpoint import COPIED, read_tensors
from random_parent import write_json, write_weights
from vqserve.format.config import PROJECTIONS, QuantConfig
from vqserve.format.names import codebook_name, expert_tensor
from vqserve.reference.dequantize import Codebook, dequantize
from vqserve.reference.gptq import dequantize_gptq


def write_plain(checkpoint: Path, folder: Path) -> Path:
    """Writes the weights of `checkpoint`, experts and spine dequantized to fp32, under the parent's names."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    quant, tensors = QuantConfig.from_dict(config.pop("quantization_config")), read_tensors(checkpoint)
    for module in quant.modules:
        codebooks = {}
        for tier in module.used_tiers():
            base = tensors.pop(codebook_name(module.name, tier.id))
            fine = tensors.pop(codebook_name(module.name, tier.id, refinement=True)) if tier.refinement_rows else None
            codebooks[tier.id] = Codebook(tier, base, fine)
        for expert in range(module.experts):
            for proj in PROJECTIONS:
                tier = module.tier(expert, proj)
                parts = ("codes", "refinement", "scales") if tier.refinement_rows else ("codes", "scales")
                planes = {part: tensors.pop(expert_tensor(module.name, expert, proj, part)) for part in parts}
                weight = dequantize(planes, codebooks[tier.id], proj)
                tensors[expert_tensor(module.name, expert, proj, "weight")] = weight
    for name in quant.spine.modules if quant.spine else ():
        assert (tensors.pop(f"{name}.qzeros") == 0x77777777).all()
        tensors[f"{name}.weight"] = dequantize_gptq(tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.scales"))
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(checkpoint / name, folder / name)
    write_json(folder / "config.json", config)
    write_weights(folder, tensors, 1)
    return folder
