"""Date tools. Dates are in ISO format, ``YYYY-MM-DD``. Results are text."""

from __future__ import annotations

from datetime import date as Date
from datetime import timedelta

from ..errors import ToolError

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def add_days(date: str, days: int) -> str:
    """The date a number of days after a date, before it if negative."""
    if isinstance(days, bool) or not isinstance(days, int):
        raise ToolError(f"add_days: days={days!r}; give a whole number")
    try:
        return (_parse_date(date) + timedelta(days=days)).isoformat()
    except OverflowError:
        raise ToolError(
            f"add_days: {date} + {days} days is outside the years 1 to 9999; give fewer days"
        ) from None


def days_between(start: str, end: str) -> str:
    """The number of days from one date to another, negative if the second is earlier."""
    return str((_parse_date(end) - _parse_date(start)).days)


def weekday(date: str) -> str:
    """The English name of the day of the week of a date."""
    return WEEKDAYS[_parse_date(date).weekday()]  # strftime would answer in the machine's language


def _parse_date(text: str) -> Date:
    try:
        if not isinstance(text, str) or len(text) != 10:
            raise ValueError
        return Date.fromisoformat(text)
    except ValueError:
        raise ToolError(f"date={text!r} is not a date; write it as YYYY-MM-DD") from None
