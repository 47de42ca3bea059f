"""`python -m experiments` with a list of tiny cells: `tiny_study.py FOLDER run|stage KEY|measure TITLE`."""

import sys
from pathlib import Path

import sparse_pathways as sp
from experiments import runner
from experiments.stages import Cell, Study
from sparse_pathways.asr.config import CorpusConfig
from sparse_pathways.asr.synthetic import synthesise

LANGUAGES = ("en", "fr")
SIZES = dict(d_model=32, heads=2, ffn=64, layers=1, encoding=32, embedding=32, vocab=48)
STUDY = Study(
    corpus=CorpusConfig(languages=LANGUAGES, train=30, dev=2, test=4),
    dense=dict(steps=6, batch=4, ctc_only_steps=2, checkpoint_every=2, eval_every=6, model=SIZES),
    prune=dict(batch=4, lr=0.05, warmup=0, checkpoint_every=2, eval_every=6),
)


def make_cells(steps: int = 8) -> tuple[Cell, ...]:
    m = sp.methods
    fixed = m.joint(m.lsp(LANGUAGES, 0.8, steps=4), m.asr_pathways(LANGUAGES, 0.8), steps)
    common = dict(sparsity=0.8, seed=0, languages=LANGUAGES)
    return (
        Cell(row="dense", name="dense", phases=(), **{**common, "sparsity": 0.0}),
        Cell(row="fixed", name="fixed", phases=fixed, **common),
    )


def main() -> int:
    folder, command, *words = sys.argv[1:]
    places = runner.Places(Path(folder), Path(folder) / "results")
    cells = make_cells()
    if command == "stage":
        runner.run_stage(STUDY, cells, words[0], places, threads=1)
    elif command == "measure":
        runner.run_measurement(STUDY, cells, words[0], places, threads=1)
    else:
        if not places.data.exists():
            synthesise(STUDY.corpus, places.data, progress=False)
        return runner.Runner([sys.executable, __file__, folder], STUDY, cells, places, 2, 1).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
