"""Run in the image: imports what serving does; prints vLLM's version.

vLLM's extensions need the driver's library, which only machines with a GPU mount: it may be missing, nothing else.
"""

from __future__ import annotations

import importlib

MODULES = (
    "torch",
    "triton",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.attention.backends.mla.triton_mla",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_model_runner",
    "vqserve.vllm_plugin.moe",
)
EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch")

if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    for extension in EXTENSIONS:
        try:
            importlib.import_module(extension)
        except ImportError as cause:
            if "libcuda.so.1: cannot open" not in str(cause):
                raise
    import vllm

    print(vllm.__version__)  # noqa: T201 - the result
