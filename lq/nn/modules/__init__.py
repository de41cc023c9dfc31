"""pytorch-quantization's ``nn.modules``."""
