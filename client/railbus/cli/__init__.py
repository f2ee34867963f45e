"""The command line `railbus`: thin commands over the client, the files and the supervisor."""
