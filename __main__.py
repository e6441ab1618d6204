"""``python -m mixkv``."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # ``-m`` put it there: the current folder may be a stranger's, and nothing is imported from one

from .cli import main

if __name__ == "__main__":
    main()
