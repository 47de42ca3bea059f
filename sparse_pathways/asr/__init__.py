"""The streaming recogniser: the first user of the public interface, from audio to text in several languages.

This is the one part of the package that needs torchaudio (Emformer, RNN-T, mel front end, beam search). torchaudio
loads only beside the torch it was built for, so a failed import is explained here, once, for every module below.
"""

from importlib import metadata

import torch

TESTED = {"torch": "2.14.1", "torchaudio": "2.11.0"}

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError, RuntimeError) as error:  # missing; a missing shared library; built for another CUDA
    try:
        found = metadata.version("torchaudio")
    except metadata.PackageNotFoundError:
        found = "none"
    raise ImportError(
        f"sparse_pathways.asr could not import torchaudio ({str(error).strip().splitlines()[0]}): found torch "
        f"{torch.__version__} and torchaudio {found}; install the pair that works: "
        f"pip install torch=={TESTED['torch']} torchaudio=={TESTED['torchaudio']}"
    ) from error
