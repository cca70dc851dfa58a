"""Runs the command line: `python -m pxcompress`, and the `pxcompress` command."""

from pxcompress.cli import main

if __name__ == "__main__":
    main()
