"""Training loops that drive the Switcher: our own, and the HF Trainer's by a callback."""
