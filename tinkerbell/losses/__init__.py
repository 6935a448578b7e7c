"""Losses: functions of the logprobs of the targets, one file for each family."""
