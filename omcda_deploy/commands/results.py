"""placeholder"""


def results() -> None: ...
