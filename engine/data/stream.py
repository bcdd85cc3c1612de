"""Stream: an endless shuffled walk over items, cut over ranks, whose whole state is one number."""

import torch


class Stream:
    """Rank r of w draws the positions r, r + w, r + 2w, ... of one walk that is reshuffled each epoch.

    The walk depends on `seed` alone, so that the ranks together draw the same items however many they are.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.cursor = 0  # draws made by this rank
        self.epoch, self.order = -1, []

    def draw(self) -> tuple[int, int]:
        """(number of the draw over all ranks, index of the item)."""
        number = self.cursor * self.world_size + self.rank
        self.cursor += 1
        epoch, position = divmod(number, self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return number, self.order[position]
