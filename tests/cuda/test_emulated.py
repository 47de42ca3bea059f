"""The CUDA kernels on the host: against float64, under sanitizers, with a race check; planted faults must be found."""

from __future__ import annotations

import pytest
from emulation import SOURCES, build, missing, prove
from mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"the kernels cannot be emulated: {missing()}")
PROOFS = ("pack", "linear", "lists", "lstm")


def changed(mutation: Mutation) -> dict[str, str]:
    text = (SOURCES / "cuda" / mutation.file).read_text()
    assert mutation.old in text, f"{mutation.name}: csrc/cuda/{mutation.file} no longer holds {mutation.old!r}"
    return {f"cuda/{mutation.file}": text.replace(mutation.old, mutation.new)}


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["traced", "address"])
def test_the_kernels_agree_with_float64(flavour):
    done = prove(build(flavour), "--quick")
    assert done.returncode == 0, done.stdout
    assert all(f"\nok   {proof}" in "\n" + done.stdout for proof in PROOFS)


@pytest.mark.slow
@pytest.mark.parametrize("proof", PROOFS)
def test_a_planted_fault_of_each_kernel_is_found(proof):
    """One of each kernel; all of them: `make prove`."""
    mutation = next(m for m in MUTATIONS if m.proof == proof and "missing" in m.name)
    assert caught(mutation)


def caught(mutation: Mutation) -> str:
    """What the proof says of a broken copy; empty if it did not notice."""
    done = prove(build(mutation.flavour, changed(mutation), (mutation.source,)), mutation.proof, "--quick")
    return f"{done.stdout}\nexit status {done.returncode}" if done.returncode else ""


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("flavour", ["traced", "address"])
def test_all_shapes_agree_with_float64(flavour):
    done = prove(build(flavour))
    assert done.returncode == 0, done.stdout


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name.replace(" ", "-") for m in MUTATIONS])
def test_every_planted_fault_is_found(mutation):
    found = caught(mutation).splitlines()
    assert found
    print(next((line for line in found if line.startswith("     ") or "ERROR" in line), found[-1]))


def test_every_mutation_applies_and_every_kernel_has_three():
    for mutation in MUTATIONS:
        assert changed(mutation)
    for kernel in ("count", "sum", "fill", "linear", "lists", "lstm"):
        assert sum(m.name.startswith(f"{kernel}:") for m in MUTATIONS) >= 3, kernel
