"""The recipe: options, memory, plan, LoRA, loss, the Trainer, its checkpoints."""
