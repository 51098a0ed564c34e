"""The actions of ``ultravox checkpoint``: one file each, with HELP, add_arguments and run like a command."""
