"""`python -m wantrain VERB ...`, the form that `accelerate launch -m` starts."""

import sys

from wantrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
