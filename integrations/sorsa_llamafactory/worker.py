"""The script that torchrun starts in each process of a training run."""

from __future__ import annotations


def main() -> None:
    """Train as the recipe says, in one process of several."""
    from sorsa_llamafactory.launch import load

    load()
    from sorsa_llamafactory.llamafactory_compat import run_exp

    run_exp()


if __name__ == "__main__":
    main()
