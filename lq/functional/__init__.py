"""Pure functions of tensors: the numerics of quantization, without modules, logging, or configuration."""
