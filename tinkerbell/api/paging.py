"""Parameters of lists. A list is paged in SQL: what a page costs does not depend on what is not on it."""

from typing import Annotated

from litestar.params import QueryParameter

MAX_POSITION = 2**63 - 1
"""Largest position either database can hold."""

Limit = Annotated[int, QueryParameter(ge=1, le=1000, description="Most items to return.")]
Offset = Annotated[int, QueryParameter(ge=0, le=MAX_POSITION, description="Items to skip; `after` is faster.")]
AfterId = Annotated[
    str | None, QueryParameter(name="after", description="Id of the last item of the page before; absent: the first.")
]
