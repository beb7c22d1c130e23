"""The loops that drive the Switcher: ours, and the HF Trainer's."""
