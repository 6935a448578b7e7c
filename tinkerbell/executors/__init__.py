"""Where tensors live: the executor port, its backends, and the child process one runs in."""
