"""The model as transformers computes it, a layer at a time: weights of any checkpoint, tokens, and the forward pass."""
