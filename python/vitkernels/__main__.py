"""``python -m vitkernels info``."""

from __future__ import annotations

import argparse

from vitkernels.info import describe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vitkernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation computes with")
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
