"""Answers calls of `bcsr_linear` over stdin and stdout, in a process started with TRITON_INTERPRET=1.

A message is a pickled bytes object that torch.save wrote: pickle alone cannot carry uint16 tensors.
"""

import io
import os
import pickle
import sys
import traceback

import torch

ANSWERS = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a print must not land among the answers

from sparse_pathways.kernels import bcsr_linear as kernel  # noqa: E402

torch_empty = torch.empty


def empty_of_nan(*size, **options):
    """`torch.empty`, but an element that the kernel forgets to write is NaN."""
    tensor = torch_empty(*size, **options)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def serve() -> None:
    torch.empty = empty_of_nan
    while True:
        try:
            message = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = kernel.bcsr_linear(**torch.load(io.BytesIO(message), weights_only=False))
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, ANSWERS)
        ANSWERS.flush()


if __name__ == "__main__":
    serve()
