"""SRLoRA as the paper's Algorithm 1: score, choose, fuse, restart."""
