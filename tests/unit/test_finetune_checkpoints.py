"""Fine-tuning that is interrupted and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tuning import Counted, data, equal, images, near, pair, small_cnn, state, tuned

from pxcompress.passes import shuffled
from pxcompress.repair import finetune
from pxcompress.types import Batch, Pruned


@pytest.fixture
def checkpoints(own_cache: Path) -> Path:
    """The folder of checkpoints."""
    return own_cache / "finetune"


class Failing(list[Batch]):
    """Batches that cannot be read any more after `left` have been."""

    left = 10**9

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def interrupted(text: str, pruned: Pruned, batches: list[Batch], held_out: list[Batch], left: int) -> None:
    failing = Failing(batches)
    failing.left = left
    with pytest.raises(KeyboardInterrupt):
        tuned(text, pruned, failing, held_out)


LAST = (pair, data(40, 10), [], "learning_rate=0.03")
IMPROVING = (pair, data(40, 10), data(30, 10, seed=1), "learning_rate=0.03")
GETTING_WORSE = (near, data(40, 10), data(30, 10, seed=1), "learning_rate=1")
IMAGES = (small_cnn, images(40, 10), images(12, 6), "learning_rate=0.001")


@pytest.mark.parametrize("left", [6, 9, 10, 21])
@pytest.mark.parametrize("case", [LAST, IMPROVING, GETTING_WORSE, IMAGES], ids=("last", "improving", "worse", "images"))
def test_an_interrupted_training_goes_on(
    left: int,
    case: tuple[Callable[[], Pruned], list[Batch], list[Batch], str],
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within an epoch and between two; bit by bit as if nothing had happened, and without doing it all again."""
    start, batches, held_out, options = case
    text = f"steps=16,batch_size=8,accumulate=2,{options}"
    monkeypatch.setattr(
        shuffled, "SHUFFLE_POOL", 10
    )  # batches are read while training goes on, not all before the first step
    expected, resumed = start(), start()
    every = Counted(expected.model)
    tuned(text, expected, batches, held_out)
    assert not checkpoints.exists()  # too short for a checkpoint
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0.0)
    interrupted(text, start(), batches, held_out, left)
    assert len(list(checkpoints.iterdir())) == 1
    rest = Counted(resumed.model)
    tuned(text, resumed, batches, held_out)
    assert equal(state(resumed), state(expected))
    assert rest.runs < every.runs
    assert not list(checkpoints.iterdir())


def test_a_checkpoint_is_for_one_training_only(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, batches = "steps=9,batch_size=8", data(40, 10)
    fresh = {seed: state(tuned(text, pair(), batches, seed=seed)) for seed in (3, 4)}
    other = {size: state(tuned(f"{text},temperature=2", pair(), data(size, 10, seed=5))) for size in (20,)}
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0.0)
    interrupted(text, pair(), batches, [], 9)
    (file,) = checkpoints.iterdir()
    assert equal(state(tuned(text, pair(), batches, seed=4)), fresh[4])
    assert equal(state(tuned(f"{text},temperature=2", pair(), data(20, 10, seed=5))), other[20])
    slim = pair()
    with torch.no_grad():
        slim.model[3].bias += 1
    counted = Counted(slim.model)
    tuned(text, slim, batches)
    assert counted.runs == 9
    assert list(checkpoints.iterdir()) == [file]
    assert equal(state(tuned(text, pair(), batches)), fresh[3])


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _give_an_older_form(file: Path) -> None:
    save_file(load_file(file), file, metadata={"progress": '{"step": 4, "error": 1.0}'})


@pytest.mark.parametrize("damage", [_cut_short, _give_an_older_form])
def test_a_damaged_checkpoint_costs_only_time(
    damage: Callable[[Path], None], checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, batches = "steps=9,batch_size=8", data(40, 10)
    expected = state(tuned(text, pair(), batches))
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0.0)
    interrupted(text, pair(), batches, [], 9)
    (file,) = checkpoints.iterdir()
    damage(file)
    assert equal(state(tuned(text, pair(), batches)), expected)


def test_a_folder_that_cannot_be_written_costs_only_the_checkpoint(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, batches = "steps=3", data(20, 10)
    expected = state(tuned(text, pair(), batches))
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0.0)
    checkpoints.write_text("a file where the folder should be")
    assert equal(state(tuned(text, pair(), batches)), expected)


LONG = "steps=600,batch_size=8,learning_rate=0.01"
CHILD = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
from safetensors.torch import save_file
from test_finetune_checkpoints import LONG
from tuning import Counted, data, pair, state, tuned
from pxcompress.repair import finetune
finetune.SAVE_SECONDS = 0.0
pruned = pair()
counted = Counted(pruned.model)
tuned(LONG, pruned, data(40, 10), data(30, 10, seed=1))
save_file(state(pruned), sys.argv[1], metadata={{"runs": str(counted.runs)}})
"""


@pytest.mark.slow
def test_a_killed_process_is_taken_up_again(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    first = subprocess.Popen([sys.executable, "-c", CHILD, str(out)])
    while not list(checkpoints.glob("*.safetensors")):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not out.exists()
    subprocess.run([sys.executable, "-c", CHILD, str(out)], check=True)
    whole = pair()
    every = Counted(whole.model)
    tuned(LONG, whole, data(40, 10), data(30, 10, seed=1))
    assert equal(load_file(out), state(whole))
    with safe_open(out, framework="pt") as file:
        assert int(file.metadata()["runs"]) < every.runs
    assert not list(checkpoints.glob("*.safetensors"))
