"""The HTTP edge: who asks, is it valid, is there room; then the log, and answers read from it."""
