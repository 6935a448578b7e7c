"""What happened: the append-only log, its projections and everything that reads them."""
