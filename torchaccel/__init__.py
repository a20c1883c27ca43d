"""torchaccel: one line makes a trained PyTorch model run fast on NVIDIA GPUs."""
