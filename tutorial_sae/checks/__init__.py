"""Exercise checks, one module for each notebook: `from tutorial_sae.checks import nb04 as check, progress`.

A check prints what it found and raises nothing, so a notebook with open exercises runs from top to bottom. With
`TUTORIAL_SAE_STRICT=1` an exercise that is not solved raises, which is how the solutions are tested.
"""

from tutorial_sae.checks.core import progress

__all__ = ["progress"]
