"""The actions of ``ultravox data``: one file each, with HELP, add_arguments and run like a command."""
