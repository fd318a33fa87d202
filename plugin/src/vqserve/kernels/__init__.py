"""Operators, one folder each, and what brings them onto the GPU. They compute what `vqserve.reference` defines."""
