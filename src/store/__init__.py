"""Artifacts on disk: atomic files, checked reading, hashes, manifests, locks and disk space."""

from .arrays import check_expected
from .atomic import (
    atomic_write,
    remove_stale_temporaries,
    remove_stale_temporaries_of,
    write_bytes,
)
from .disk import free_bytes, human_bytes, require_space, require_writable
from .hashes import hash_arrays, hash_file, hash_json, short_hash
from .jsonfile import read_json, require_match, write_json
from .lock import folder_lock
from .manifest import MANIFEST_NAME, Manifest, clear_folder, read_manifest
from .npzfile import NpzReader, load_npz, open_npz, save_npz
from .streams import TensorWriter, read_pieces, stream_tensors
from .tensors import (
    TensorInfo,
    load_folder,
    load_tensors,
    read_folder_headers,
    read_header,
    save_folder,
    save_tensors,
)

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "NpzReader",
    "TensorInfo",
    "TensorWriter",
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
    "open_npz",
    "read_folder_headers",
    "read_header",
    "read_json",
    "read_manifest",
    "read_pieces",
    "remove_stale_temporaries",
    "remove_stale_temporaries_of",
    "require_match",
    "require_space",
    "require_writable",
    "save_folder",
    "save_npz",
    "save_tensors",
    "short_hash",
    "stream_tensors",
    "write_bytes",
    "write_json",
]
