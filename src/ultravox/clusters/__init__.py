"""Jobs on clusters: the command lines that they run, and AzureML's job files, checked before anything is sent."""
