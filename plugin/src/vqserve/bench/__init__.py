"""`vqserve bench`: what the kernels and the whole model take on the GPU that is there."""
