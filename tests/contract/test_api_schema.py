"""The OpenAPI document is kept: generated requests, valid and not, get documented answers and never a 5xx."""

import threading
from collections.abc import Iterator

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings as hypothesis_settings
