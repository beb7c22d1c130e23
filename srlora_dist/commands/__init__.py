"""One file or folder per command: ``srlora NAME`` calls ``run(argv)`` of ``commands/NAME``."""
