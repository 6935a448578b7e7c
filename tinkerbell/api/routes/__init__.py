"""The routes, one file for each kind of thing a caller asks about."""
