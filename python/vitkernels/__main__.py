"""``python -m vitkernels``: what this installation computes with."""

from __future__ import annotations

import argparse

import vitkernels
from vitkernels.info import describe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vitkernels")
    parser.add_argument("--version", action="version", version=f"vitkernels {vitkernels.__version__}")
    commands = parser.add_subparsers()
    commands.add_parser("info", help="what this installation computes with, also without a command")
    parser.parse_args()
    try:
        print(describe())
    except RuntimeError as error:  # of a setting
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
