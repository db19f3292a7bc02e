"""`zaya demo`."""

import dataclasses


@dataclasses.dataclass
class Demo:
    """Placeholder until evaluation lands."""

    def run(self): ...
