"""Routed experts at prefill."""
