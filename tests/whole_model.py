"""Whole models in transformers' own class, as the reference for what computes them a layer at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.utils import logging

from vqserve.format.names import layer_of
from vqserve.model.weights import open_model


def load_model(folder: Path) -> GlmMoeDsaForCausalLM:
    """The model in fp32, its weights exactly those stored: a parent's, or dequantized from a vqserve checkpoint."""
    opened = open_model(folder)
    unused = opened.geometry.mtp_layers  # transformers' class does not have them
    state = {name: opened.tensor(name).float() for name in opened.names if layer_of(name) not in unused}
    logging.disable_progress_bar()
    model: GlmMoeDsaForCausalLM = GlmMoeDsaForCausalLM.from_pretrained(
        None, config=GlmMoeDsaConfig.from_dict(dict(opened.config)), state_dict=state, dtype=torch.float32
    )
    evaluated: GlmMoeDsaForCausalLM = model.eval()
    return evaluated
