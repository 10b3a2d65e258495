"""Stages dapt, sft and dpo: training with Unsloth or TRL and PEFT."""
