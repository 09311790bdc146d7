"""What a sampling command is to make: which images, under which numbers, in which batches."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from dci.samples.image_metadata import PromptMetadata, SamplingMetadata


class PlannedImage(NamedTuple):
    """One image of a plan."""

    prompt: int  # number of its prompt in the plan
    seed: int
    number: int  # under that prompt and seed


@dataclass(frozen=True)
class Plan:
    """Every prompt's images, `n_samples` with each seed.

    Numbers and batches follow from the plan alone, so that the work may be split in any way.
    """

    prompts: list[PromptMetadata]
    settings: SamplingMetadata  # of all images
    seeds: list[int]
    n_samples: int
    batch_size: int  # images made together, of whatever prompts and seeds

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    @property
    def per_prompt(self) -> int:
        """Images of a prompt."""
        return len(self.seeds) * self.n_samples

    def image(self, number: int) -> PlannedImage:
        """Return what image `number` is of: a prompt's images follow one another, and in them a seed's."""
        prompt, rest = divmod(number, self.per_prompt)
        seed, index = divmod(rest, self.n_samples)
        return PlannedImage(prompt, self.seeds[seed], index)

    def metadata(self, number: int) -> dict[str, Any]:
        """Return everything needed to make image `number` again, as its record has it."""
        prompt, seed, index = self.image(number)
        place = {"seed": seed, "batch_size": self.batch_size, "index": index}
        return self.prompts[prompt].to_json() | self._settings | place

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self.settings.to_json()

    def batches(self, shard: int = 1, of: int = 1) -> list[range]:
        """Return the numbers of the images that are made together.

        Images of another batch would round differently, so a shard has whole batches.

        Args:
            shard: which share of the batches, from 1 to `of`.
        """
        starts = range(0, len(self), self.batch_size)[shard - 1 :: of]
        return [range(start, min(start + self.batch_size, len(self))) for start in starts]
