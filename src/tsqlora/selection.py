"""From scores to a draw: softmax probabilities, seeded draws without replacement, a Sampler."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from tsqlora import processes
from tsqlora.columns import blocks_of, column, copied, in_python
from tsqlora.data import numbered, require_map_style
from tsqlora.errors import ConfigError, DataError, TrainingError
from tsqlora.quality import QualityScores

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


def draw_size(samples: int, fraction: float) -> int:
    """⌈fraction · N⌉, at least 1.

    Raises:
        DataError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise DataError(f"fraction = {fraction} is outside (0, 1]; 0.5 keeps half of the samples.")
    return max(1, math.ceil(fraction * samples - 1e-9))


def draw(
    probability: NDArray[np.floating], fraction: float, seed: int, epoch: int = 0
) -> NDArray[np.int64]:
    """⌈fraction·N⌉ positions drawn without replacement, each next one with p ∝ `probability`.

    Gumbel top-k (Kool et al. 2019, arXiv 1903.06059): the positions with the largest
    log p_i + Gumbel noise, in the order drawn. Samples of probability 0 are never drawn: where too
    few others are there for the size, those are drawn again, each once more before any a third
    time. The same arguments always give the same draw.
    """
    size = draw_size(len(probability), fraction)
    if not probability.any():
        probability = np.ones(len(probability))
    possible, random = int((probability > 0).sum()), np.random.default_rng([seed, epoch])
    rounds = [
        np.argsort(_noisy(probability, random), kind="stable")[:possible]
        for _ in range(math.ceil(size / possible))
    ]
    return (np.concatenate(rounds) if len(rounds) > 1 else rounds[0])[:size]


def rounds(
    inclusion: NDArray[np.floating], fraction: float, seed: int, epoch: int = 0
) -> NDArray[np.int64]:
    """⌈fraction·N⌉ positions from rounds that hold each sample `inclusion` (N) times on average.

    That is with this probability, or, where it is above 1, so often or once more. Below 1 all grow
    alike until the likeliest are in every round. Rounds are in random order; as many follow each
    other as it takes. Where all are alike they are permutations of the pool. The same arguments
    always give the same draw.
    """
    size, random = draw_size(len(inclusion), fraction), np.random.default_rng([seed, epoch])
    if not inclusion.any():
        inclusion = np.ones(len(inclusion))
    inclusion = inclusion / min(inclusion.max(), 1.0)
    whole, part = np.divmod(inclusion, 1.0)
    found: list[NDArray[np.int64]] = []
    while sum(map(len, found)) < size:
        times = whole.astype(np.int64) + (random.random(len(part)) < part)
        found.append(random.permutation(np.repeat(np.arange(len(times)), times)))
    return np.concatenate(found)[:size]


def drawn(probability: NDArray[np.floating], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which samples `draw` takes (N), without their order, so that nothing need be sorted."""
    size, possible = draw_size(len(probability), fraction), probability > 0
    if not possible.any():
        probability, possible = column(len(probability), fill=1), ~possible
    if possible.sum() <= size:
        return possible
    noisy = _noisy(probability, np.random.default_rng([seed, 0]))
    ordered = copied(noisy)
    ordered.partition(size - 1)
    found = noisy < ordered[size - 1]
    found[np.flatnonzero(noisy == ordered[size - 1])[: size - found.sum()]] = True
    return found


def _noisy(probability: NDArray[np.floating], random: np.random.Generator) -> NDArray[np.floating]:
    """-(log p_i + Gumbel noise) (N), infinite where p_i is 0."""
    result = column(len(probability), fill=np.inf)
    for rows in blocks_of(len(probability)):
        possible = probability[rows] > 0
        log_p = np.log(probability[rows][possible])
        result[rows][possible] = -(log_p + random.gumbel(size=len(log_p)))
    return result


def select_samples(
    dataset: Dataset, scores: QualityScores, fraction: float = 0.5, seed: int = 0
) -> Dataset:
    """The rows of `dataset` that one seeded draw by `scores.probability` takes, in their own order.

    Fewer than `fraction` of them where too few have any probability.

    Raises:
        DataError: the scores are of a pool of another size, `dataset` is no `datasets.Dataset`, or
            the fraction is outside (0, 1].
    """
    require_map_style(dataset, "the data set")
    require_own_scores(dataset, scores.ids)
    return dataset.select(np.flatnonzero(drawn(scores.probability, fraction, seed)))


def require_own_scores(dataset: Any, ids: NDArray[np.integer]) -> None:
    """Check that scores of samples `ids` are those of `dataset`, as far as can be told.

    Raises:
        DataError: it has another number of rows, or its column `id` names others.
    """
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    if rows != len(ids):
        raise DataError(
            f"The data set has {'no length' if rows is None else f'{rows} rows'} but the scores "
            f"are of {len(ids)} samples: score this data set."
        )
    own = numbered(dataset)
    if own is None or np.array_equal(own, ids):
        return
    by_row = np.array_equal(ids, np.arange(len(ids)))  # as files are scored, whatever their `id`
    if not by_row or np.array_equal(np.sort(own), ids):
        first = int(np.flatnonzero(own != ids)[0])
        raise DataError(
            f"Row {first} of the data set has id {own[first]}, but the scores there are of sample "
            f"{ids[first]}: score this data set, and neither sort nor filter it after."
        )


def unscored(ids: NDArray[np.integer], fraction: float, seed: int, verdict: str) -> QualityScores:
    """What the scores are where nothing was measured: all samples alike, NaN for every term."""
    samples = len(ids)
    unknown, probability = column(samples, fill=np.nan), column(samples, fill=1 / samples)
    selected = drawn(probability, fraction, seed)
    return QualityScores(
        ids=ids,
        loss=unknown,
        gradient_norm=unknown,
        loss_reduction=unknown,
        convergence=unknown,
        credibility=column(samples, fill=1),
        quality=column(samples),
        probability=probability,
        selected=selected,
        verdict=verdict,
    )


class QualitySampler(Sampler[int]):
    """A torch Sampler that draws ⌈fraction·N⌉ positions afresh each epoch by `scores.probability`.

    `DataLoader(rows, sampler=QualitySampler(scores))`, or `QualitySampler(scores).attach(trainer)`.
    With `inclusion` (N) set, epochs are `rounds` of it instead. The draw depends on (seed, epoch,
    what it is drawn by) alone. The Trainer and accelerate call `set_epoch`; iterated
    again without that, the sampler goes on to the next epoch.

    Raises:
        DataError: the fraction is outside (0, 1].
    """

    def __init__(self, scores: QualityScores, fraction: float = 0.5, seed: int = 0) -> None:
        self.ids, self.probability = scores.ids, scores.probability
        self.fraction, self.seed, self.epoch = fraction, seed, 0
        self.inclusion: NDArray[np.floating] | None = None
        self._size = draw_size(len(scores.ids), fraction)
        self._begun = self.asked = False

    def attach(self, trainer: Trainer) -> None:
        """Let a Trainer, or one of its kind such as TRL's SFTTrainer, train on these draws.

        To be called before `train()`. The scores have to be of `trainer.train_dataset`, which is
        not always what the Trainer was given: SFTTrainer drops, cuts and may shuffle rows.

        Raises:
            DataError: the scores are of other rows, or the Trainer packs samples together.
            ConfigError: its arguments ask for another order.
            TrainingError: the processes' scores differ.
        """
        if getattr(trainer.args, "packing", False):
            raise DataError(
                "packing=True puts several samples into one row, so none can be drawn by its own "
                "quality: set packing=False, and score trainer.train_dataset then."
            )
        strategy = getattr(trainer.args, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy = {strategy} orders the samples, which QualitySampler "
                "does: leave it out."
            )
        require_own_scores(trainer.train_dataset, self.ids)
        if len(set(processes.gather(zlib.crc32(self.probability.tobytes())))) > 1:
            raise TrainingError(
                "The processes hold different scores, so they would draw different samples: call "
                "score_samples(..., together=True) in all of them."
            )
        trainer._get_train_sampler = lambda *_: self  # type: ignore[method-assign]
        trainer.add_callback(_Asked(self))

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's draw the next iteration gives."""
        self.epoch, self._begun = epoch, False

    def __iter__(self) -> Iterator[int]:
        self.epoch, self._begun = self.epoch + self._begun, True
        self.asked = True
        if self.inclusion is not None:
            return in_python(rounds(self.inclusion, self.fraction, self.seed, self.epoch))
        return in_python(draw(self.probability, self.fraction, self.seed, self.epoch))

    def __len__(self) -> int:
        return self._size


class _Asked(TrainerCallback):
    """Nothing silently does nothing: by the first step the sampler has been asked for a draw."""

    def __init__(self, sampler: QualitySampler) -> None:
        self.sampler = sampler

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self.sampler.asked:
            raise TrainingError(
                "The Trainer trains on batches that QualitySampler has not drawn, as its "
                "get_train_dataloader does not ask _get_train_sampler: give the sampler to its "
                "DataLoader, DataLoader(rows, sampler=QualitySampler(scores))."
            )


class LengthGrouped(Sampler[int]):
    """The draws of a `QualitySampler` in batches of like `lengths` (N, those of all samples)."""

    def __init__(self, draws: QualitySampler, lengths: Sequence[int], batch_size: int) -> None:
        self.draws, self.lengths, self.batch_size = draws, lengths, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's draw the next iteration gives."""
        self.draws.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.draws)
        lengths = [self.lengths[i] for i in drawn]
        seed = self.draws.seed + self.draws.epoch
        return iter([drawn[i] for i in length_grouped(lengths, self.batch_size, seed)])

    def __len__(self) -> int:
        return len(self.draws)


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of positions in which batches hold like lengths, as `group_by_length` makes them.

    The Trainer's batches fall in length from one to the next; here they come in any order, the
    longest one first and a smaller one last, so that what is trained on within some steps is like
    the whole.
    """
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    full = len(order) // batch_size
    shuffled = (1 + torch.randperm(max(full - 1, 0), generator=generator)).tolist()
    batches = [*range(min(full, 1)), *shuffled]
    grouped = [i for b in batches for i in order[b * batch_size : (b + 1) * batch_size]]
    return [*grouped, *order[full * batch_size :]]
