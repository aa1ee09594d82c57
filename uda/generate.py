"""The pseudo-labels of a net in a folder of their own: the command `generate_pseudo_labels.py`."""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_handlers.images import image_size
from data_handlers.label_maps import colourise
from data_handlers.labelled import check_samples
from training.distributed import Rank
from training.launching import in_processes, launch
from training.precision import channels_last
from training.preparation import target_files
from training.segmentation_files import load_segmentation_net
from uda.cbst import labelling_of, probabilities_of
from uda.cbst_config import LabellingFlags
from uda.labelling import PseudoLabels, label_path, read_manifest
from utils.devices import resolve_devices, workers_for
from utils.errors import UserError
from utils.files import TEMPORARY, atomic_write, check_folder

CONTINUE = "the same command continues"


def generate(flags: LabellingFlags, script: str) -> None:
    """Label the images, alone or in the processes that this one launches.

    Raises:
        UserError: bad input, or the output holds something else than labels of these images by this net.
    """
    in_processes(lambda rank: _generate(flags, Path(script), rank), CONTINUE)


def _generate(flags: LabellingFlags, script: Path, rank: Rank) -> None:
    devices, output, skips = resolve_devices(flags.gpus), Path(flags.output), flags.on_bad_image == "skip"
    if rank.count == 1 and len(devices) > 1:
        launch(script, devices, if_killed=CONTINUE)
        return
    rank = rank.at(devices)
    shape, net = load_segmentation_net(Path(flags.weights), "--weights")
    files = target_files(flags, shape.num_classes, flags.split_tgt)
    check_samples(files, labels=False, skip=skips)
    workers = workers_for(flags.num_workers, rank.device, rank.count)
    labelling = labelling_of(
        flags, files, net, shape, policy=flags.kc_policy, rank=rank, num_workers=workers, skips=skips
    )
    channels_last(net.to(rank.device))
    is_continued = _check_output(output, labelling.made_from(net, flags.portion))
    rank.barrier()  # what the others have still to check is not yet written to
    if rank.is_main:
        print(f"{shape} labels {files.describe()} on {rank.device}", flush=True)
    total = (1 if is_continued else 3) * len(files.images[rank.index :: rank.count])
    with tqdm(total=total, unit="img", dynamic_ncols=True, disable=not rank.is_main) as bar:
        labels = labelling.run(net, probabilities_of(net), output, flags.portion, bar.update)
    if flags.colours:
        for name in labels.files.images[rank.index :: rank.count]:
            _write_colours(labels, name)
    if rank.is_main:
        print("\n".join([*(f"skipped: {reason}" for reason in labels.skipped), f"{output}: {labels.describe()}"]))


def _check_output(output: Path, made_from: dict[str, Any]) -> bool:
    """Require an output that is missing, empty, or holds such labels; returns whether it does."""
    check_folder(output, "--output")
    if not output.is_dir() or all(path.name.endswith(TEMPORARY) for path in output.iterdir()):
        return False
    if read_manifest(output).get("made_from") != made_from:
        raise UserError(
            f"--output {output} holds files that are no labels of these images by this net with these flags; name "
            "another folder"
        )
    return True


def _write_colours(labels: PseudoLabels, name: str) -> None:
    path = label_path(labels.folder, name)
    picture = Image.fromarray(colourise(labels.read(name, image_size(path)), labels.files.data_set.colours))
    atomic_write(path.with_name(f"{path.stem}_colour.png"), partial(picture.save, format="PNG", compress_level=1))
