"""report."""

from flows._runtime import Stage, main


def report(stage: Stage) -> None:
    """Report."""


if __name__ == "__main__":
    main(report)
