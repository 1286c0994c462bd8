"""Errors as chains: what is told first is often not what went wrong first."""

from collections.abc import Iterator


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, one after the other, the first cause last."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
