"""One rank of several trainings, one after the other: `torchrun rank.py FITS.json`, a list of lists of arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # cpu_strategies

from lit_personalize.errors import UsageError
from lit_personalize.fitting import fit
from lit_personalize.ranks import is_rank_zero

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            fit(arguments)
        except UsageError as error:
            name = arguments[arguments.index("--name") + 1]
            if is_rank_zero():
                Path(f"{name}.refused").write_text(str(error))
