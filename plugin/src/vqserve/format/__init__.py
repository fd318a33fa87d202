"""The checkpoint format: configuration, tensor names and shapes, files and their checks. Standard library only."""
