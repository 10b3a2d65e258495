"""Stages dapt and sft: LoRA training with Unsloth or TRL/PEFT."""
