"""Kill and disturb training, cache building and export at random moments, and see whether anything is lost.

    python benchmarks/fault_campaign.py --kills 20

A tiny world on the CPU. Every row injects one kind of fault, again and again with the same command line, until the
program has finished, and compares what it made, bit for bit, with what an undisturbed program makes. Exit code 1 if a
row fails.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# The scripts of this folder are run by path, and then their own folder is where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from benchmarks.pictures import write_gta5
from benchmarks.victims import Victim
from training.checkpoint import LATEST, PREVIOUS, has_checkpoint, read_newest
from training.flags import Parser
from utils.errors import UserError, run_cli
from utils.files import TEMPORARY
from utils.stopping import STOP_SIGNALS, STOPPED

SIZE = (64, 32)
SOURCE_SIZE = (256, 128)  # larger than a pipe between processes, as real pictures are
LONGEST = 120.0  # seconds that any command may take


@dataclass(frozen=True)
class Row:
    """What came of one kind of fault.

    Attributes:
        injected: times it happened.
        survived: times after which the state on the disk was whole, and no older than before.
        lost: images, or steps of a checkpoint, that were there and are not any more.
        equal: whether the finished result is that of the undisturbed program.
    """

    fault: str
    injected: int
    survived: int
    lost: int
    equal: bool

    @property
    def passed(self) -> bool:
        """Whether nothing was lost."""
        return self.injected == self.survived > 0 and self.lost == 0 and self.equal

    def __str__(self) -> str:
        equal = "equal" if self.equal else "DIFFERENT"
        return f"| {self.fault} | {self.injected} | {self.survived} | {self.lost} | {equal} |"


class Campaign:
    """The world, the undisturbed results, and the commands.

    Args:
        work: empty folder.
        kills: of each of training, cache building and export.
        steps: of each of the two scales.
        images: of each domain.
        seed: of the moments.
    """

    def __init__(self, work: Path, kills: int, steps: int, images: int, seed: int) -> None:
        self.work, self.kills, self.images = work, kills, images
        self.random = random.Random(seed)
        write_gta5(work / "source", images, SOURCE_SIZE)
        write_gta5(work / "target", images, SIZE)
        self.flags = [
            "--gpus", "cpu", "--no_semseg", "--src_data_dir", work / "source", "--target", "folder",
            "--trg_data_dir", work / "target" / "images", "--src_resize", 64, 32, "--trg_resize", 64, 32,
            "--crop_size", 48, 32, "--num_scales", 1, "--base_channels_list", 8, "--batch_size", 1, "--vgg_weights",
            "random", "--content_layers", 3, "--style_layers", 3, "--steps_per_scale", steps, "--print_rate", 5,
            "--save_checkpoint_rate", 1, "--num_workers", 1, "--tb_logs_dir", work / "logs", "--precision", "fp32",
        ]  # fmt: skip
        self.seconds: dict[str, float] = {}
        # The first one also imports everything, for all; what is timed gives the moments of the kills.
        self._finish(Victim("train_procst", ["--help"], work))
        started = time.perf_counter()
        self._finish(self.train("undisturbed"))
        self.seconds["train"] = time.perf_counter() - started
        self.weights = self.hash_of_run("undisturbed")
        started = time.perf_counter()
        self._finish(self.export("undisturbed"))
        self.seconds["export"] = time.perf_counter() - started
        self.pixels = self.hash_of_images("undisturbed")

    # --- commands and results ------------------------------------------------------------------------------------

    def train(self, run: str, *more: object, **limits: int) -> Victim:
        """Start, or go on with, the training of that name."""
        return Victim("train_procst", [*self.flags, "--run_dir", self.work / run, *more], self.work, **limits)

    def export(self, name: str) -> Victim:
        """Start, or go on with, the export of the undisturbed run to a set of that name."""
        out = self.work / f"sit_{name}"
        flags = ["--gpus", "cpu", "--trained_procst_path", self.work / "undisturbed", "--sit_output_path", out]
        return Victim("create_sit_dataset", [*flags, "--skip_created_files", "--num_workers", 1], self.work)

    def _finish(self, victim: Victim, code: int = 0) -> None:
        """Wait for the end of a command.

        Raises:
            UserError: it does not end as it should.
        """
        found = victim.wait(LONGEST)
        if found != code:
            raise UserError(f"{victim}: ended with {found} instead of {code}: {victim.last_line()}")

    def state(self, run: str) -> tuple[int, int]:
        """(stage, step) of the newest checkpoint that is whole; (-1, 0) before there is one.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        if not has_checkpoint(self.work / run):
            return -1, 0
        checkpoint, _ = read_newest(self.work / run)
        return checkpoint.stage, checkpoint.step

    def hash_of_run(self, run: str) -> str:
        """SHA-256 of all weights and optimiser states of the newest checkpoint."""
        checkpoint, _ = read_newest(self.work / run)
        digest = hashlib.sha256()
        for name, tensor in _tensors({"modules": checkpoint.modules, "optimizers": checkpoint.optimizers}):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def hash_of_images(self, name: str) -> str:
        """SHA-256 of all files of a SiT set but its manifest, names included."""
        root = self.work / f"sit_{name}"
        digest = hashlib.sha256()
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".json":
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
        return digest.hexdigest()

    # --- faults --------------------------------------------------------------------------------------------------

    def killed_training(self, in_writes: bool) -> Row:
        """SIGKILL at random moments, or while a checkpoint is being written."""
        injected = survived = lost = 0
        equal = True
        runs = 0
        while injected < self.kills:
            run = f"killed_{in_writes}_{runs}"
            runs += 1
            while injected < self.kills:
                before = self.state(run)
                victim = self.train(run)
                ended = self._until_checkpoint_write(victim, run) if in_writes else self._some_time(victim, "train")
                if ended or not victim.kill():
                    break
                injected += 1
                try:
                    older = self.state(run) < before
                    lost += older
                    survived += not older
                except UserError as error:
                    print(error)
            self._finish(self.train(run))
            equal = equal and self.hash_of_run(run) == self.weights and not self._leftovers(run)
        where = "while a checkpoint is written" if in_writes else "at random moments"
        return Row(f"SIGKILL of training {where}", injected, survived, lost, equal)

    def _some_time(self, victim: Victim, what: str) -> bool:
        """Let it work for a random share of what it takes undisturbed; True if it has ended."""
        return victim.ended_within(self.random.uniform(0.0, self.seconds[what]))

    def _until_checkpoint_write(self, victim: Victim, run: str) -> bool:
        """Let it take some steps, then wait until there is a half-written file; True if it has ended."""
        if self._some_time(victim, "train"):
            return True
        while not victim.ended_within(0.0002):
            if self._leftovers(run):
                return False
        return True

    def _leftovers(self, run: str) -> list[Path]:
        return list((self.work / run).glob(f".*{TEMPORARY}"))

    def killed_cache_building(self) -> Row:
        """SIGKILL while the cache of both domains is filled."""
        cache, injected, survived = self.work / "cache", 0, 0
        while injected < self.kills:
            shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(self.work / "cached", ignore_errors=True)
            victim = self.train("cached", "--cache_dir", cache)
            while not cache.exists() and not victim.ended_within(0.001):
                pass
            victim.ended_within(self.random.uniform(0.0, 0.3))
            in_building = bool(list(cache.rglob("*.npy")))
            if not victim.kill() or not in_building:
                continue  # it was too late
            injected += 1
            self._finish(self.train("cached", "--cache_dir", cache))
            survived += self.hash_of_run("cached") == self.weights
        return Row("SIGKILL of cache building", injected, survived, 0, self.hash_of_run("cached") == self.weights)

    def killed_export(self) -> Row:
        """SIGKILL at random moments of the export."""
        injected = survived = lost = sets = 0
        equal = True
        while injected < self.kills:
            name = f"killed_{sets}"
            sets += 1
            while injected < self.kills:
                before = self._images(name)
                victim = self.export(name)
                if self._some_time(victim, "export") or not victim.kill():
                    break
                injected += 1
                gone = len(before - self._images(name))
                survived += not gone
                lost += gone
            self._finish(self.export(name))
            equal = equal and self.hash_of_images(name) == self.pixels
        return Row("SIGKILL of export at random moments", injected, survived, lost, equal)

    def _images(self, name: str) -> set[Path]:
        return set((self.work / f"sit_{name}").rglob("*.png"))

    def stopped(self) -> Row:
        """Each of the signals that ask for an end in good order."""
        injected = survived = lost = 0
        for number in STOP_SIGNALS:
            before = self.state("stopped")
            victim = self.train("stopped")
            while self.state("stopped") <= before:
                if victim.ended_within(0.01):
                    raise UserError(f"{victim} ended before it could be stopped; use more --steps")
            at = self.state("stopped")
            victim.send(number)
            injected += 1
            survived += victim.wait(LONGEST) == STOPPED
            lost += self.state("stopped") < at
        self._finish(self.train("stopped"))
        equal = self.hash_of_run("stopped") == self.weights
        return Row("SIGINT, SIGTERM, SIGUSR1, SIGHUP", injected, survived, lost, equal)

    def full_disk(self) -> Row:
        """A checkpoint that the system lets be written in part only."""
        victim = self.train("full")
        while self.state("full") < (0, 2):
            if victim.ended_within(0.01):
                raise UserError(f"{victim} ended before the disk was full; use more --steps")
        victim.kill()
        before = self.state("full")
        size = (self.work / "full" / LATEST).stat().st_size
        victim = self.train("full", file_size=size // 2)
        survived = victim.wait(LONGEST) == 2 and LATEST in victim.last_line()
        lost = self.state("full") < before
        self._finish(self.train("full"))
        return Row("no space for a checkpoint", 1, int(survived), int(lost), self.hash_of_run("full") == self.weights)

    def killed_loader(self) -> Row:
        """SIGKILL of loader processes in the middle of the training."""
        killed = survived = lost = 0
        while killed < 2:
            before = self.state("loader")
            victim = self.train("loader")
            while self.state("loader") <= before or not victim.kill_child():
                if victim.ended_within(0.05):
                    raise UserError(f"{victim} ended before its loader was killed; use more --steps")
            killed += 1
            at = self.state("loader")
            survived += victim.wait(LONGEST) == STOPPED
            lost += self.state("loader") < at
        self._finish(self.train("loader"))
        return Row("SIGKILL of loaders", killed, survived, lost, self.hash_of_run("loader") == self.weights)

    def killed_export_loader(self) -> Row:
        """SIGKILL of loader processes in the middle of the export."""
        killed = survived = lost = 0
        while killed < 2:
            before = self._images("loader")
            victim = self.export("loader")
            while len(self._images("loader")) == len(before) or not victim.kill_child():
                if victim.ended_within(0.02):
                    raise UserError(f"{victim} ended before its loader was killed; use more --images")
            killed += 1
            survived += victim.wait(LONGEST) == STOPPED
            lost += len(before - self._images("loader"))
        self._finish(self.export("loader"))
        equal = self.hash_of_images("loader") == self.pixels
        return Row("SIGKILL of loaders of the export", killed, survived, lost, equal)

    def damaged_checkpoint(self) -> Row:
        """A flipped bit in the newest checkpoint, which is then reported, and the one before it used."""
        victim = self.train("damaged")
        while self.state("damaged") < (1, 2):
            if victim.ended_within(0.01):
                raise UserError(f"{victim} ended before its checkpoint was damaged; use more --steps")
        victim.kill()
        latest = self.work / "damaged" / LATEST
        data = bytearray(latest.read_bytes())
        data[len(data) // 2] ^= 1
        latest.write_bytes(data)
        victim = self.train("damaged")
        survived = victim.wait(LONGEST) == 0 and PREVIOUS in victim.output()
        return Row("a flipped bit in latest.pth", 1, int(survived), 0, self.hash_of_run("damaged") == self.weights)

    def unreadable_image(self) -> Row:
        """An image that is cut short while the training runs, and restored after it has stopped."""
        victim = self.train("image")
        while self.state("image") < (0, 1):
            victim.ended_within(0.01)
        whole = {path: path.read_bytes() for path in (self.work / "source" / "images").iterdir()}
        for path, data in whole.items():
            path.write_bytes(data[:100])
        survived = victim.wait(LONGEST) == 2 and "images/" in victim.last_line()
        before = self.state("image")
        for path, data in whole.items():
            path.write_bytes(data)
        lost = self.state("image") < before
        self._finish(self.train("image"))
        return Row("images turn unreadable", 1, int(survived), int(lost), self.hash_of_run("image") == self.weights)

    def rows(self) -> list[Callable[[], Row]]:
        """All faults."""
        return [
            lambda: self.killed_training(in_writes=False), lambda: self.killed_training(in_writes=True),
            self.killed_cache_building, self.killed_export, self.stopped, self.full_disk, self.killed_loader,
            self.killed_export_loader, self.damaged_checkpoint, self.unreadable_image,
        ]  # fmt: skip


def _tensors(value: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, in their order, and where it stands."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{place} {key}")


def run_campaign(work: Path, kills: int, steps: int, images: int, seed: int) -> list[Row]:
    """Inject all faults, print the table, and return its rows."""
    campaign = Campaign(work, kills, steps, images, seed)
    seconds = ", ".join(f"{what} {value:.1f} s" for what, value in campaign.seconds.items())
    print(f"undisturbed: {seconds}\n")
    print("| fault | injected | survived | lost | final hashes |\n| --- | --- | --- | --- | --- |", flush=True)
    found = []
    for inject in campaign.rows():
        found.append(inject())
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Command line entry."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=20, help="of each of training, cache building and export (default: %(default)s)")
    add("--steps", type=int, default=25, help="of each of two scales (default: %(default)s)")
    add("--images", type=int, default=60, help="of each domain (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    flags = parser.parse_args()
    if min(flags.kills, flags.steps - 4, flags.images) < 1:
        raise UserError("--kills and --images must be at least 1, and --steps at least 5")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny pictures
    with tempfile.TemporaryDirectory() as folder:
        failed = [row for row in run_campaign(Path(folder), flags.kills, flags.steps, flags.images, flags.seed)
                  if not row.passed]
    if failed:
        print(f"{len(failed)} rows FAILED")
        sys.exit(1)
    print("\nnothing was lost")


if __name__ == "__main__":
    run_cli(main)
