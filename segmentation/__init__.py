"""What is trained: networks, losses, metrics, data and the epoch loop, in plain PyTorch."""
