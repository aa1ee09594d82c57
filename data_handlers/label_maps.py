"""Conversions between label ids, trainIds and colours."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data_handlers.classes import CLASS_COLOURS, IGNORE

_UNKNOWN = 254  # marks ids in a table that are neither mapped nor known to be void


def to_train_ids(label: np.ndarray, id_map: Mapping[int, int], void_ids: Collection[int] | None = None) -> np.ndarray:
    """Map data set ids (any integer array, 0 to 2**24 - 1) to trainIds, uint8 of the same shape.

    Args:
        void_ids: ids that become 255; None means every id that `id_map` does not list.

    Raises:
        ValueError: an id is in neither; the exception's argument is the first such id.
    """
    values = 2**16 if label.dtype.itemsize <= 2 else 2**24  # only packed colours are that large
    table = np.full(values, IGNORE if void_ids is None else _UNKNOWN, dtype=np.uint8)
    if void_ids is not None:
        table[list(void_ids)] = IGNORE
    for data_set_id, train_id in id_map.items():
        table[data_set_id] = train_id
    mapped = table[label]
    if void_ids is not None and (unknown := mapped == _UNKNOWN).any():
        raise ValueError(int(label[unknown][0]))
    return mapped


def ids_of_train_ids(id_map: Mapping[int, int]) -> np.ndarray:
    """The data set's id of each trainId 0, 1, ..., uint8 (C,); the first one listed where several have one trainId."""
    ids = {train_id: i for i, train_id in reversed(id_map.items())}
    return np.array([ids[train_id] for train_id in range(len(ids))], dtype=np.uint8)


def to_data_set_ids(train_ids: np.ndarray, id_map: Mapping[int, int]) -> np.ndarray:
    """TrainIds (any shape) -> ids of a data set, uint8; ignored pixels and other trainIds become 0."""
    table = np.zeros(256, dtype=np.uint8)
    ids = ids_of_train_ids(id_map)
    table[: len(ids)] = ids
    return table[train_ids]


def colourise(train_ids: np.ndarray, colours: Sequence[Sequence[int]] = CLASS_COLOURS) -> np.ndarray:
    """TrainIds (h,w) -> RGB uint8 (h,w,3) in the classes' colours; ignored pixels and further classes are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    return table[train_ids]
