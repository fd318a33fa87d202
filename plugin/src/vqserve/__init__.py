"""Mixed-bit vector-quantized GLM mixture-of-experts models: encode them, and serve them on unpatched vLLM."""

from __future__ import annotations

__version__ = "0.1.0"
