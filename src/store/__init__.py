"""Artifacts on disk: atomic files, checked reading, hashes, manifests, locks and disk space."""

from .arrays import check_expected
from .atomic import atomic_write, remove_stale_temporaries, write_bytes
from .disk import free_bytes, human_bytes, require_space, require_writable
from .hashes import hash_arrays, hash_file, hash_json, short_hash
from .jsonfile import read_json, require_match, write_json
from .lock import folder_lock
from .manifest import MANIFEST_NAME, Manifest, clear_folder, read_manifest
from .npzfile import load_npz, save_npz
from .tensors import (
    TensorInfo,
    load_folder,
    load_tensors,
    read_header,
    save_folder,
    save_tensors,
)

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "TensorInfo",
    "atomic_write",
    "check_expected",
    "clear_folder",
    "folder_lock",
    "free_bytes",
    "hash_arrays",
    "hash_file",
    "hash_json",
    "human_bytes",
    "load_folder",
    "load_npz",
    "load_tensors",
    "read_header",
    "read_json",
    "read_manifest",
    "remove_stale_temporaries",
    "require_match",
    "require_space",
    "require_writable",
    "save_folder",
    "save_npz",
    "save_tensors",
    "short_hash",
    "write_bytes",
    "write_json",
]
