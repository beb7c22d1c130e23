"""What ``srlora NAME`` does: one file a command, with ``run(argv)`` and in its first line what it is for."""
