"""Training: LoRA fine-tuning of the BF16 persona and its distillation under NVFP4, one loop for both."""
