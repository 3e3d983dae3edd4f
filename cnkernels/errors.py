"""The one way an op refuses its arguments."""


def expect(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raises ValueError "op: `argument` must be <expected>, got <got>" unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: `{argument}` must be {expected}, got {got}")
