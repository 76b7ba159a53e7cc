"""The API's times: metav1.Time (whole seconds) and metav1.MicroTime, both RFC 3339 in UTC."""

from datetime import UTC, datetime


def format_time(moment: datetime) -> str:
    """metav1.Time: `2026-01-02T03:04:05Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_micro_time(moment: datetime) -> str:
    """metav1.MicroTime: `2026-01-02T03:04:05.678901Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Either of the two, aware. Raises ValueError."""
    return datetime.fromisoformat(text).astimezone(UTC)
