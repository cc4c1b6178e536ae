"""`python -m relax_llm.cli` does what `relax-llm` does."""

import sys

from relax_llm.cli import main

sys.exit(main())
