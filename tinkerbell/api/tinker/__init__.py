"""The protocol of the `tinker` SDK under `/api/v1`: a translation onto the same events as `/v1`."""
