"""The command line: one file per command, the only place where the parts are wired together."""
