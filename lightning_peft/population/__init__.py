"""Population training: many adapters trained at once on one frozen base, each as in a run of its own.

::

    batch (rows) ──repeated──> rows of member a │ rows of member b │ ...   one forward of the base, one backward
                                  loss a             loss b
                               optimizer a        optimizer b              schedule, clipping, early stop, checkpoint of each
"""

from lightning_peft.population.checkpoint import PopulationCheckpoint
from lightning_peft.population.members import Member, MemberGrid
from lightning_peft.population.module import PopulationModule
from lightning_peft.population.results import MemberResult
from lightning_peft.population.standings import Halving

__all__ = ["Halving", "Member", "MemberGrid", "MemberResult", "PopulationCheckpoint", "PopulationModule"]
