"""The actions of ``ultravox azureml``: one file each, and what both ask of a job file."""
