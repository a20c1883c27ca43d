"""What the fused backend is made of: operators, kernels, and the passes that put them into a program."""
