"""Run the command line as `python -m megatron_xmtf`."""

import sys

from megatron_xmtf.cli import main

if __name__ == "__main__":
    sys.exit(main())
