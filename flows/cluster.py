"""cluster."""

from flows._runtime import Stage, main


def cluster(stage: Stage) -> None:
    """Cluster."""


if __name__ == "__main__":
    main(cluster)
