"""Routed experts at token decode."""
