"""`python -m fastllm`, the same as `fastllm`."""

import sys

from fastllm.cli import main

sys.exit(main())
