# SPDX-License-Identifier: Apache-2.0
"""The process of one trial: `python -m dualblade.bench.child`, a Trial as a line of JSON on stdin.

On stdout a JSON object a line: {"token": n} as tokens come, at the end {"record"} or {"error", "hint"}. At
the trial's pauses it waits for another line on stdin, or its end. It enters its memory cgroup before it loads
anything, so that all it takes is charged there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dualblade.errors import DualBladeError
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def main() -> int:
    plain = json.loads(sys.stdin.readline())
    if plain["cgroup"]:
        MemoryCgroup(plain["cgroup"], Host()).enter()
    from dualblade.bench.trial import Trial, run_trial
    from dualblade.models import quiet_libraries

    quiet_libraries()
    trial = Trial.of(plain)

    def tell(count: int) -> None:
        say(token=count)
        if count in trial.pauses:
            sys.stdin.readline()

    try:
        say(record=run_trial(trial, tell))
    except DualBladeError as error:
        say(error=error.message, hint=error.hint)
        return error.exit_code
    except OSError as error:
        say(error=f"{type(error).__name__}: {error}", hint=None)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
