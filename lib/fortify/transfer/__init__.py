"""Do attacks, networks and what was learned carry over: to other models, other patients, another dataset?"""

from fortify.transfer import answer, crafting, networks, nodules

__all__ = ["answer", "crafting", "networks", "nodules"]
