"""`vqserve preflight`: whether a machine, or a pod on it, can serve a checkpoint, said before minutes of loading."""
