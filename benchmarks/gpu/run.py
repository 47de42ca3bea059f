"""On a GPU machine: build, all tests marked gpu, the sanitizer, ceilings and yardstick tables. README.md tells more.

    python benchmarks/gpu/run.py [--out FOLDER] [--parts NAME ...] [--seconds S] [--dry-run]

Every part is a process of its own with a budget of seconds, and writes its rows as they come: a part that hangs,
crashes or runs out of time loses only its rest. Exits 2 without a device, 1 if a test failed or a part ended badly.
`--out` may be a folder with other files in it: only those that an earlier run wrote are deleted.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NO_DEVICE = 3  # exit code of `part.py environment`; a crash has another
TESTS = ["tests/kernels/test_on_device.py", "tests/ops"]
SANITIZED = "products_equal_dense and M37 and 32x32 or feed_forward and 7 or several_pathways and 5 and bfloat16"
STRIPS = "tests/ops/test_strips_on_device.py"
SANITIZED_STRIPS = "few_rows or rows_apart and 200 or lstm and 5 and bfloat16 or lists_of_all or 300 and 8 and bfloat16"
# In a dry run the device is pretended: what needs a real one (bfloat16, graphs, streams, much memory) is left out.
PRETENDED = "float16 and not bfloat16 and (products and M37 and 16x16 or residual or union and 5 or feed_forward and 7)"


class Part(NamedTuple):
    """Name, seconds it may take, and whether the default run has it."""

    name: str
    seconds: int
    default: bool = True


PARTS = (
    Part("environment", 90),  # a first import of torch and Triton from a cold disk
    Part("build", 150),
    Part("ceilings", 25),
    Part("tests", 200),
    Part("forward", 100),
    Part("strips", 60),
    Part("training", 60),
    Part("yardsticks", 45),
    Part("rivals", 45),
    Part("ffn", 40),
    Part("pathways", 30),
    Part("sanitizer", 90),
    Part("racecheck", 60),
    Part("tune", 200, default=False),
)


def command(name: str, out: Path, dry: bool) -> list[str] | None:
    """What a part runs; None where this machine has nothing to run for it."""
    pytest = [sys.executable, "-m", "pytest", "-p", "checkout", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    if name == "build":
        wanted = not dry and any((ROOT / "csrc").glob("cuda/*.cu")) and shutil.which("nvcc")
        return [sys.executable, "setup.py", "build_ext", "--inplace"] if wanted else None
    if name == "tests":
        chosen = ["tests/kernels/test_on_device.py", "-k", PRETENDED] if dry else TESTS
        parallel = ["-n", "8"] if not dry and importlib.util.find_spec("xdist") else []  # compiling is most of the time
        return [*pytest, *parallel, "--durations=5", f"--junitxml={out / 'tests.xml'}", *chosen]
    if name in ("sanitizer", "racecheck"):
        tool = shutil.which("compute-sanitizer")
        if dry or tool is None:
            return None
        checked = [*pytest, STRIPS, "-k", SANITIZED_STRIPS]
        if name == "sanitizer":
            checked = [*pytest, TESTS[0], STRIPS, "-k", f"{SANITIZED} or {SANITIZED_STRIPS}"]
        kind = "memcheck" if name == "sanitizer" else "racecheck"
        return [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all", *checked]
    return [sys.executable, str(HERE / "part.py"), name, str(out / f"{name}.jsonl")]


def environment(dry: bool) -> dict[str, str]:
    """Of the parts' processes."""
    path = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the caller may have torch there
    found = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    return found | ({"TRITON_INTERPRET": "1", "SPARSE_PATHWAYS_PRETEND": "1"} if dry else {})


def run_part(part: Part, out: Path, left: float, dry: bool) -> dict:
    """Run one part to its end or its budget's; what became of it."""
    arguments, seconds = command(part.name, out, dry), min(part.seconds, left)
    if arguments is None:
        return {"part": part.name, "outcome": "skipped: nothing to run here"}
    if seconds < 5:
        return {"part": part.name, "outcome": "skipped: no time left"}
    start = time.monotonic()
    with open(out / f"{part.name}.log", "w") as log:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment(dry), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            outcome = "ok" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after its {seconds:.0f} s"
    found = {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    if outcome != "ok":
        found["log_tail"] = (out / f"{part.name}.log").read_text(errors="replace")[-1500:]
    return found


def clear(out: Path) -> None:
    """Delete what an earlier run left, and nothing else: the folder may be the user's."""
    parts = [f"{part.name}{suffix}" for part in PARTS for suffix in (".jsonl", ".log")]
    for name in ("results.json", "tests.xml", *parts):
        (out / name).unlink(missing_ok=True)


def rows_of(out: Path) -> list[dict]:
    """Rows that the parts have written; a last line cut off in the middle is dropped."""
    rows = []
    for path in (out / f"{part.name}.jsonl" for part in PARTS):
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                pass
    return rows


def without_environment(outcome: str) -> int:
    """Say why nothing is measured; the exit code. A slow or broken import is no missing device."""
    if outcome == f"failed: exit code {NO_DEVICE}":
        print("no CUDA device on this machine; nothing was measured (--dry-run tries the scripts without one)")
        return 2
    print(f"nothing was measured: torch, Triton or the device could not be asked ({outcome})")
    return 1


def print_rows(rows: list[dict]) -> None:
    """A line per row: microseconds of every contender, measured ratio, the model's."""
    for row in rows:
        if "times" in row:
            shape = f"{row['m']:>6} x {row['n']:>5} x {row['k']:>5} {row['block'][0]:>3}x{row['block'][1]:<3}"
            eager = row.get("eager", ())
            times = "  ".join(
                f"{name}{' (no graph)' if name in eager else ''} {one['us']:.1f}" for name, one in row["times"].items()
            )
            model = f" (model {row['model_ratio']:.2f}x, {row['model_bound']})" if "model_ratio" in row else ""
            refused = "".join(f"; {name} refuses: {why}" for name, why in row.get("refused", {}).items())
            print(
                f"{row['part']:<10} {row['op']:<7} {shape} {row['sparsity']:.0%}  {times} us  "
                f"{row['ratio']:.2f}x{model}{refused}"
            )
        elif row["part"] == "ceilings":
            print(
                f"ceilings   {row['name']}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("part", "name"))
            )
        elif row["part"] == "strips":
            refused = "; refused: " + row["refused"] if row.get("refused") else ""
            print(f"strips     {row.get('name', row.get('op'))}: {row.get('us', 0.0):.1f} us{refused}")
        elif row["part"] == "tune":
            print(f"tune       {row['name']}: {row['best']}")


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for JSON and logs (runs/gpu)")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--seconds", type=float, default=570, help="of the whole run (570)")
    parser.add_argument("--tune", action="store_true", help="also look for better schedules")
    parser.add_argument("--dry-run", action="store_true", help="no device: tiny cases on the CPU, numbers mean nothing")
    options = parser.parse_args()
    end, out = time.monotonic() + options.seconds, options.out
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    outcomes = []
    for part in PARTS:
        wanted = part.name in options.parts if options.parts else part.default or (options.tune and part.name == "tune")
        if wanted or part.name == "environment":
            outcome = run_part(part, out, end - time.monotonic(), options.dry_run)
            outcomes.append(outcome)
            print(
                f"-- {part.name}: {outcome['outcome']}" + (f", {outcome['seconds']} s" if "seconds" in outcome else "")
            )
            print(outcome.get("log_tail", ""), end="", flush=True)
            result = {"dry_run": options.dry_run, "parts": outcomes, "rows": rows_of(out)}
            (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            if part.name == "environment" and outcome["outcome"] != "ok":
                return without_environment(outcome["outcome"])
            if part.name == "tests" and outcome["outcome"].startswith("failed"):
                print("tests failed: what follows may be fast and wrong")
    print_rows(rows_of(out))
    print(f"written to {out / 'results.json'}")
    return 0 if all(one["outcome"] == "ok" or one["outcome"].startswith("skipped") for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
