"""Stages checkpoints into volumes, and follows, explains and drains releases of the chart on Kubernetes."""

from __future__ import annotations

__version__ = "0.1.0"
