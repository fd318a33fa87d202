"""Weights from the checkpoint's order to the kernels'."""
