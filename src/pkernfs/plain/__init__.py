"""Plain paths: programs that open a file of a mount by name, and get its segment's own memory.

``pkernfs exec`` has a supervisor answer such opens. Nothing here needs the daemon or its socket.
"""
