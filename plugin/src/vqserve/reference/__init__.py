"""The oracle in plain torch: pack, dequantize, matmul, moe. It is the specification, and what CPUs serve with."""
