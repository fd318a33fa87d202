"""Measuring what an encoding costs: divergence from the parent, and what a served model still knows."""
