"""A tracker whose library is not installed."""

from app.catalog import Tracker

tracker = Tracker("absent", lambda run: None, needs="a_module_that_nobody_has")  # type: ignore[arg-type, return-value]
