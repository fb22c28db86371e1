"""The control socket of a daemon: protocol, client, server, handlers."""
