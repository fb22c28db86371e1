"""The FUSE adapter: handlers, session, event loop, background, start."""
