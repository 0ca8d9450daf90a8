"""What a training step costs on this machine's GPU, side by side with what the same step costs elsewhere."""
